"""Decisions of rank 0 for all ranks. Rank 0 decides and reports a refusal, and all ranks exit with the same code.

Where the answer may differ between machines, the first rank of each machine checks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch.distributed as dist

from configs.errors import ConfigError, Problem
from pretrain.rank.process_setup import exit_code_of, report_refusal
from pretrain.run.files import is_of_the_disk, storage_error

T = TypeVar("T")


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise a ConfigError with these problems; do nothing without any."""
    if problems:
        raise ConfigError(problems)


def gather_machine_problems(local_rank: int, check: Callable[[], list[Problem]]) -> list[Problem]:
    """Run `check` on the first rank of each machine. Collective.

    Rank 0 gets each problem once, with the number of machines that have it. Other ranks get an empty list.
    """
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

    A ConfigError becomes one report by rank 0 and SystemExit(2) on all ranks. What a disk refuses, a DiskError or an OSError,
    becomes SystemExit(1). The error is its cause.
    """
    rank = dist.get_rank()
    answer: list[Any] = [None]
    if rank == 0:
        try:
            answer = [(work(), None)]
        except ConfigError as error:
            answer = [(None, error)]
        except OSError as error:
            if not is_of_the_disk(error):
                raise
            answer = [(None, storage_error("file system", error.filename or "?", error))]
    dist.broadcast_object_list(answer, src=0)
    value, refusal = answer[0]
    if refusal is None:
        return value
    if rank == 0:
        report_refusal(refusal, os.environ)
    # torchrun ends all ranks when one exits. The barrier lets rank 0 print its report first.
    dist.barrier()
    raise SystemExit(exit_code_of(refusal)) from refusal
