"""Ranks that refuse together: rank 0 decides and reports, all of them leave with the same exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from configs.errors import ConfigError, Problem, report
from configs.run_folder import EXIT_BAD_INPUT
from pretrain.rank_process import record_failure

T = TypeVar("T")


def refuse(problems: Sequence[Problem]) -> None:
    """Raises ConfigError when there are any."""
    if problems:
        raise ConfigError(problems)


def lead(work: Callable[[], T]) -> T:
    """Rank 0 does it, all ranks get its (picklable) result; a ConfigError becomes one report and exit 2 everywhere."""
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
