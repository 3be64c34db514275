"""The file events.jsonl: one JSON object a line. In: a run folder and an event of pretrain/run/events.py. Out: one whole line.

Several processes write the file: rank 0, and the launchers and supervisors around it, perhaps on other hosts. Each append
locks the file, repairs the incomplete line that a crash of another writer may have left, and writes one line. The lock is
flock and no POSIX record lock, which would end when any descriptor of the file is closed in this process. Over NFS, Linux
turns flock into a lock at the server.

Torch-free.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pretrain.run.events import EventKind, check_event
from pretrain.run.files import append_line, mend_torn_line
from pretrain.run.folder import RunFolder

# In seconds. A lock is held for microseconds, unless its holder was stopped meanwhile (SIGSTOP). The watchdog that reports such a
# stopped process writes an event too, so it must not wait for that lock for ever.
PATIENCE_S = 5.0


def append_event(folder: RunFolder, attempt: int, kind: EventKind, time_s: float | None = None, /, **fields: Any) -> None:
    """Append {"time", "attempt", "kind", fields…}. `time_s`: when it happened, in seconds since the epoch; None: now.

    Raises OSError when the disk refuses the line, and AssertionError when the fields aren't those of the kind.
    """
    check_event(kind, fields)
    row = {"time": round(time.time() if time_s is None else time_s, 3), "attempt": attempt, "kind": kind, **fields}
    with _locked(folder) as descriptor:
        mend_torn_line(folder.events)
        append_line(descriptor, row)


def mend_events(folder: RunFolder) -> int:
    """Complete or remove an incomplete last line. Returns the number of bytes removed. Raises OSError."""
    if not folder.events.exists():
        return 0
    with _locked(folder):
        return mend_torn_line(folder.events)


def sync_events(folder: RunFolder) -> None:
    """Force the events to the disk. Raises OSError."""
    descriptor = os.open(folder.events, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: RunFolder) -> Iterator[int]:
    """A descriptor of the file, open for appending, locked inside the block.

    The block runs without the lock when it was not free within PATIENCE_S, or when the file system has no locks.
    """
    descriptor = os.open(folder.events, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor)
        yield descriptor
    finally:
        # Closing is not enough: a child forked meanwhile by another thread would keep the lock.
        _unlock(descriptor)
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                return
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            # The file system has no locks. A single write of a whole line is the best that remains.
            return
        time.sleep(0.005)


def _unlock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
