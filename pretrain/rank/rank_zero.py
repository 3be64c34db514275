"""Decisions of rank 0 for all ranks: rank 0 decides and reports a refusal, and all ranks exit with the same code.

What may differ between machines is checked by the first rank of each machine.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch.distributed as dist

from configs.errors import ConfigError, Problem, report
from pretrain.rank.process_setup import record_failure
from pretrain.run.folder import EXIT_BAD_INPUT

T = TypeVar("T")


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises ConfigError when there are any."""
    if problems:
        raise ConfigError(problems)


def gather_machine_problems(local_rank: int, check: Callable[[], list[Problem]]) -> list[Problem]:
    """Run `check` on each machine; rank 0 gets one problem for all machines that have it, and other ranks get none."""
    world = dist.get_world_size()
    mine = (socket.gethostname(), check()) if local_rank == 0 else None
    answers: list[Any] | None = [None] * world if dist.get_rank() == 0 else None
    dist.gather_object(mine, answers, dst=0)
    return group_by_problem([answer for answer in answers or [] if answer is not None])


def group_by_problem(found: Sequence[tuple[str, list[Problem]]]) -> list[Problem]:
    """Merge equal problems of several machines. Each says how many machines have it and names the first.

    `found`: (machine, its problems).
    """
    alike: dict[str, tuple[Problem, list[str]]] = {}
    for host, problems in found:
        for problem in problems:
            alike.setdefault(repr(problem), (problem, []))[1].append(host)
    if len(found) == 1:
        return [problem for problem, _ in alike.values()]
    return [
        replace(problem, rule=f"{problem.rule}; so on {len(hosts)} of {len(found)} machines, the first is {hosts[0]}")
        for problem, hosts in alike.values()
    ]


def run_on_rank_0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its picklable result on all ranks. Collective.

    A ConfigError becomes one report by rank 0 and SystemExit(2) on all ranks.
    """
    rank = dist.get_rank()
    answer: list[Any] = [None]
    if rank == 0:
        try:
            answer = [(work(), None)]
        except ConfigError as error:
            answer = [(None, error.problems)]
    dist.broadcast_object_list(answer, src=0)
    value, problems = answer[0]
    if problems is None:
        return value
    if rank == 0:
        record_failure(os.environ, "bad_input", report(problems))
        print(report(problems), file=sys.stderr, flush=True)
    # torchrun ends the other ranks when one has left: the report comes first.
    dist.barrier()
    raise SystemExit(EXIT_BAD_INPUT)
