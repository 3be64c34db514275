"""One live attempt a run folder. In: the lock file's path. Out: a held lock, or a ConfigError that names the holder.

The kernel's flock decides: it ends with its holder, however that dies. A process forked from rank 0 inherits it, so a
checkpoint writer that outlives rank 0 still keeps others out. flock may not reach other hosts (NFS mounted with
local_lock), therefore the holder also touches the file: a lock of another host that moves is alive, one that stands
still is not. Only the file's time is watched, never compared with this host's clock.

Torch-free.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from dataclasses import replace

from configs.errors import ConfigError
from pretrain.run.folder import (
    HEARTBEAT_S,
    SILENCE_S,
    Holder,
    RunFolder,
    held_problem,
    holder_text,
    process_start_ticks,
    read_holder,
)

# A killed rank 0 and its children need a moment to die before the next start is refused.
PATIENCE_S = 5.0


class FolderLock:
    """A held lock with its heartbeat. Build it with `acquire`."""

    def __init__(self, folder: RunFolder, descriptor: int) -> None:
        self._folder = folder
        self._descriptor = descriptor
        self._holder = Holder(socket.gethostname(), os.getpid(), 0, process_start_ticks(os.getpid()))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)

    def hold(self, attempt: int) -> None:
        """Write the holder into the lock file, and start the heartbeat."""
        self._holder = replace(self._holder, attempt=attempt)
        self._write(self._holder)
        self._thread.start()

    def is_ours(self) -> bool:
        """False once the lock file was removed or replaced: another attempt may be writing to the folder."""
        return _same_file(self._folder, self._descriptor)

    def release(self) -> None:
        """Free the folder: the next attempt can take it at once, on any host."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self.is_ours():
                self._write(replace(self._holder, released=True))
        finally:
            os.close(self._descriptor)

    def _write(self, holder: Holder) -> None:
        # In place: the lock is on this inode, a rename would leave it behind.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, holder_text(holder), 0)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                os.utime(self._descriptor)
            except OSError:
                # A file server that is away for a while must not end training; the next beat tries again.
                continue


def acquire(folder: RunFolder, patience_s: float = PATIENCE_S, silence_s: float = SILENCE_S) -> FolderLock:
    """Take the folder's lock. Raises ConfigError when a live attempt holds it, OSError when the file can't be made."""
    deadline = time.monotonic() + patience_s
    while True:
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if _try_flock(descriptor) and _same_file(folder, descriptor):
                _refuse_live_elsewhere(folder, silence_s)
                return FolderLock(folder, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise ConfigError(held_problem(folder, read_holder(folder) or Holder("unknown", 0, 0, 0)))
        time.sleep(0.05)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(folder: RunFolder, descriptor: int) -> bool:
    """Whether the open file is still the file at that path."""
    try:
        return os.path.samestat(os.stat(folder.lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refuse_live_elsewhere(folder: RunFolder, silence_s: float) -> None:
    """Watch the lock of another host for `silence_s`; it costs that wait only after a crash on another host."""
    holder = read_holder(folder)
    if holder is None or holder.released or holder.host == socket.gethostname():
        return
    seen = _last_beat_ns(folder)
    deadline = time.monotonic() + silence_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, silence_s / 4))
        if _last_beat_ns(folder) != seen:
            raise ConfigError(held_problem(folder, holder))


def _last_beat_ns(folder: RunFolder) -> int:
    """The lock's time, asked through an open: NFS may answer a bare stat from a cache of up to a minute."""
    descriptor = os.open(folder.lock, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
