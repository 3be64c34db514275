"""The lock of a run folder, which admits one live attempt. In: a run folder. Out: its holder; a held lock, or a ConfigError.

The kernel's flock decides who holds the folder. The kernel frees it when the holder dies, whatever the cause. A process that
rank 0 forked inherits the lock, so a checkpoint writer that outlives rank 0 still keeps other attempts out.

flock doesn't reach other hosts on NFS mounted with local_lock. The holder therefore also updates the file's modification
time. A holder on another host is alive while that time changes. The time is compared with its own earlier value only, because
the clocks of two hosts may differ.

Torch-free.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configs.errors import ConfigError, Problem
from pretrain.run.files import read_json
from pretrain.run.folder import RunFolder
from pretrain.run.process import process_start_ticks

# In seconds. The holder touches the lock file every HEARTBEAT_S. A holder on another host that has not touched it for SILENCE_S
# is dead.
HEARTBEAT_S = 5.0
SILENCE_S = 4 * HEARTBEAT_S
# In seconds. A killed rank 0 and its children need a moment to die; only then is the next start refused.
PATIENCE_S = 5.0


@dataclass(frozen=True)
class LockHolder:
    """The process of rank 0 that trains, or trained, in a run folder.

    `start_ticks`: its start time in clock ticks since boot, which differs for a later process with the same pid.
    """

    host: str
    pid: int
    attempt: int
    start_ticks: int
    released: bool = False

    def describe(self) -> str:
        return f"attempt {self.attempt}, process {self.pid} on {self.host}"


def read_holder(folder: RunFolder) -> LockHolder | None:
    """The holder that the lock file names, dead or alive. None: no lock file exists, or it is incomplete."""
    value = read_json(folder.lock)
    try:
        return LockHolder(**value) if isinstance(value, dict) else None
    except TypeError:
        return None


def holder_text(holder: LockHolder) -> bytes:
    """The content of the lock file."""
    return json.dumps(asdict(holder)).encode() + b"\n"


def live_holder(folder: RunFolder) -> LockHolder | None:
    """The holder that trains here now. None: no process does.

    The kernel's lock decides; for a holder on another host, the age of its heartbeat decides too.
    """
    holder = read_holder(folder)
    if _kernel_says_held(folder.lock):
        return holder or LockHolder("unknown", 0, 0, 0)
    if holder is None or holder.released or holder.host == socket.gethostname():
        return None
    # The kernel's lock doesn't reach other hosts on NFS mounted with local_lock. There the heartbeat decides.
    return holder if time.time() - folder.lock.stat().st_mtime < SILENCE_S else None


def held_problem(folder: RunFolder, holder: LockHolder) -> Problem:
    """The refusal of a second live attempt."""
    return Problem(
        "run.dir",
        str(folder.path),
        f"one live attempt a run folder; it is held by {holder.describe()}",
        f"wait for it, end it (phalanx cancel {folder.path}), or choose another run.dir; "
        f"if you know that it is dead: rm {folder.lock}",
    )


class FolderLock:
    """A lock that this process holds, with its heartbeat thread. `acquire` makes it."""

    def __init__(self, folder: RunFolder, descriptor: int) -> None:
        self._folder = folder
        self._descriptor = descriptor
        self._holder = LockHolder(socket.gethostname(), os.getpid(), 0, process_start_ticks(os.getpid()))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)

    def hold(self, attempt: int) -> None:
        """Write this process as the holder into the lock file, and start the heartbeat. Raises OSError."""
        self._holder = replace(self._holder, attempt=attempt)
        self._write(self._holder)
        self._thread.start()

    def is_ours(self) -> bool:
        """False after the lock file was removed or replaced. Another attempt may then be writing to the folder."""
        return _same_file(self._folder, self._descriptor)

    def release(self) -> None:
        """Free the folder, so that the next attempt can take it immediately on any host. Raises OSError."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self.is_ours():
                self._write(replace(self._holder, released=True))
        finally:
            os.close(self._descriptor)

    def _write(self, holder: LockHolder) -> None:
        # The file is rewritten in place: the lock belongs to this inode, and a rename would put an unlocked one at the path.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, holder_text(holder), 0)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                os.utime(self._descriptor)
            except OSError:
                # A file server that is unreachable for a while must not end training. The next beat tries again.
                continue


def acquire(folder: RunFolder, patience_s: float = PATIENCE_S, silence_s: float = SILENCE_S) -> FolderLock:
    """Take the folder's lock, waiting at most `patience_s` for a holder on this host to die.

    `silence_s`: how long the heartbeat of a holder on another host must stand still. Raises ConfigError when a live attempt
    holds the folder, and OSError when the lock file can't be created.
    """
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
            raise ConfigError(held_problem(folder, read_holder(folder) or LockHolder("unknown", 0, 0, 0)))
        time.sleep(0.05)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(folder: RunFolder, descriptor: int) -> bool:
    """Whether the open descriptor still belongs to the file at the lock's path."""
    try:
        return os.path.samestat(os.stat(folder.lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refuse_live_elsewhere(folder: RunFolder, silence_s: float) -> None:
    """Raise ConfigError when a holder on another host is alive.

    The wait of `silence_s` occurs only when an attempt on another host ended without releasing the lock.
    """
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
    """The lock file's modification time in nanoseconds.

    The file is opened first, because NFS may answer a plain stat from a cache that is up to a minute old.
    """
    descriptor = os.open(folder.lock, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _kernel_says_held(lock: Path) -> bool:
    """Whether some process has an exclusive flock on the file.

    The question takes a shared lock for an instant. A process that wants the exclusive lock at that moment tries again.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
