"""torchrun's agent with ranks that are functions, as launch/agent.py starts it: its faults, and how its function is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, RunProcsResult, logger
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from parallel.compat.private_names import replaced, require_names

require_names(__name__)


@contextmanager
def program_function(run_program: Callable[..., None]) -> Iterator[None]:
    """`torchrun --run-path` starts `run_program(PATH, ARGUMENT, …)` in each rank, in the place of torch's own function."""
    with replaced(torchrun, "run_script_path", run_program):
        yield


@contextmanager
def ends_from_exit_codes() -> Iterator[None]:
    """The agent learns how ranks ended from their exit codes, as it does for ranks that are commands.

    Of ranks that are functions, torch wants the results, and lets each one wait until all have returned: a rank that has ended
    well and is asked to end, because another one failed, would stay for 30 s. It also reports only one of the ranks that
    failed between two looks of the agent. The rank that was killed may then be missing, and a partner that lost it be named.
    Before it ends the other ranks, torch logs a traceback of its own, for which its formatter imports torch._dynamo: 2 s of CPU.
    """
    poll = MultiprocessContext._poll

    def poll_exit_codes(self: MultiprocessContext) -> RunProcsResult | None:
        result = poll(self)
        codes = {rank: process.exitcode for rank, process in enumerate(self._pc.processes)} if self._pc is not None else {}
        if result is None and codes and all(code == 0 for code in codes.values()):
            return RunProcsResult(dict.fromkeys(codes), stdouts=self.stdouts, stderrs=self.stderrs)
        if result is not None and result.is_failed():
            for rank, code in codes.items():
                if code and rank not in result.failures:
                    result.failures[rank] = ProcessFailure(rank, self.pids()[rank], code, self.error_files[rank])
        return result

    logger.addFilter(_drop_traceback)
    with replaced(MultiprocessContext, "_poll", poll_exit_codes):
        yield


def _drop_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True
