"""The frame of a process that copies the record elsewhere: its task, rank 0's orders, its end. Each kind of copy fills it in.

In: the task as a JSON line on stdin, then the line {"close": exit code}, or the end of the pipe when rank 0 dies. Out: an exit
code. What the copy writes to may hang, crash or fill the memory; in a process of its own that doesn't affect training.

Torch-free.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

POLL_S = 0.5
# In seconds. After rank 0's death, its last rows are sent within this time.
ORPHAN_S = 5.0
# Exit codes of a copy that has printed a warning: it took longer than it may; it gave up; its library can't be imported.
TOO_LONG, GAVE_UP, UNUSABLE = 3, 4, 5


class Job(Protocol):
    """A copy's task. `label`: its name in warnings. `remedy`: what follows the warning that its library is missing."""

    @property
    def label(self) -> str: ...

    @property
    def remedy(self) -> str: ...

    @property
    def finish_timeout_s(self) -> float: ...


J = TypeVar("J", bound=Job)


def warn(text: str, label: str = "W&B") -> None:
    """Print one line to stderr, which rank 0's log keeps."""
    print(f"phalanx: {label}: {text}; metrics.jsonl has every row", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """The error's text without line breaks, at most 200 characters."""
    return " ".join(str(error).split())[:200]


def _end_within(seconds: float) -> None:
    """End this process with exit code TOO_LONG after `seconds`, even if the copy hangs."""
    timer = threading.Timer(seconds, os._exit, args=(TOO_LONG,))
    timer.daemon = True
    timer.start()


class Orders:
    """Reads rank 0's lines in a thread, so that rank 0's death ends this process even while a call of the copy hangs."""

    def __init__(self, pipe: BinaryIO, finish_timeout_s: float) -> None:
        self._pipe = pipe
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._finish_timeout_s = finish_timeout_s
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def next(self, timeout_s: float) -> bytes | None:
        """A line from rank 0, waiting at most `timeout_s`. Empty: rank 0 is gone. None: no line has come."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _read(self) -> None:
        # A process that rank 0 forked may keep the pipe open after rank 0's death. A changed parent also shows the death.
        parent = os.getppid()
        line = b""
        while os.getppid() == parent:
            if select.select([self._pipe], [], [], POLL_S)[0]:
                line = self._pipe.readline()
                break
        _end_within(self._finish_timeout_s if line else ORPHAN_S)
        self._lines.put(line)


def exit_code_of(line: bytes) -> int:
    """The run's exit code in rank 0's line. Empty, after rank 0's death: 1."""
    return json.loads(line)["close"] if line else 1


def run_copy(make_job: Callable[..., J], lock_of: Callable[[J], Path], follow: Callable[[J, Orders], None]) -> int:
    """The whole process: read the task, take the lock, follow the record. Returns the exit code.

    `lock_of`: the path of the task's lock. A failure is one warning.
    """
    # A stop signal reaches the whole process group. This process ignores it and ends by its pipe, after the last row.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The pipe is unbuffered, because select doesn't see bytes that a buffer has read.
    pipe = open(0, "rb", buffering=0)  # noqa: SIM115  held until the process ends
    first = pipe.readline()
    if not first:
        return 0
    job = make_job(**json.loads(first))
    orders = Orders(pipe, job.finish_timeout_s)
    try:
        with open(lock_of(job), "w") as lock:
            # The copy of the previous attempt may still send its last rows. Two copies at a time would send them twice.
            fcntl.flock(lock, fcntl.LOCK_EX)
            follow(job, orders)
    except ImportError as error:
        warn(f"there is no copy ({one_line(error)}){job.remedy}", job.label)
        return UNUSABLE
    except Exception as error:
        warn(f"the copy ended ({type(error).__name__}: {one_line(error)})", job.label)
        return GAVE_UP
    return 0
