"""events.jsonl: what happened to a run, one JSON object a line. In: the run folder and an event. Out: the line, whole.

Several processes write it: rank 0, and the launchers and supervisors around it, perhaps on other hosts. Each append takes
a lock on the file, mends what a crash of another writer tore, and writes one line. flock, not POSIX record locks: those
end when any descriptor of the file is closed in this process; over NFS Linux turns flock into a lock at the server.

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

from pretrain.run.files import append_line, mend_torn_line
from pretrain.run.folder import RunFolder

# A holder that was stopped in the middle of its microseconds must not stop the watchdog that is to report just that.
PATIENCE_S = 5.0


def append_event(folder: RunFolder, attempt: int, kind: str, /, **fields: Any) -> None:
    """Append {"time" (s since the epoch), "attempt", "kind", fields…}. Raises OSError when the disk refuses the line."""
    row = {"time": round(time.time(), 3), "attempt": attempt, "kind": kind, **fields}
    with _locked(folder) as descriptor:
        mend_torn_line(folder.events)
        append_line(descriptor, row)


def mend_events(folder: RunFolder) -> int:
    """Finish or cut a torn last line; returns the bytes cut. Raises OSError."""
    if not folder.events.exists():
        return 0
    with _locked(folder):
        return mend_torn_line(folder.events)


def sync_events(folder: RunFolder) -> None:
    """Have the events on the disk. Raises OSError."""
    descriptor = os.open(folder.events, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: RunFolder) -> Iterator[int]:
    """The events, open for appending, locked for as long as this takes; after PATIENCE_S, or without locks, as they are."""
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
            # A file system without locks: one write of one line is the best that can be had.
            return
        time.sleep(0.005)


def _unlock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
