"""One launch at a time in a run folder. In: the run folder. Out: a lock that is held during a launch, or a refusal.

A local launcher holds the lock until its ranks are gone. A Slurm submission holds it until the job is in the queue. The
kernel releases the lock when the process ends, even if the process is killed. Rank 0 takes a lock of its own
(pretrain/run/lock.py) seconds later. Without the launch lock, two simultaneous launches would both start ranks before that.

Torch-free.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from configs.errors import ConfigError, Problem
from pretrain.run.files import read_json, storage_problem
from pretrain.run.folder import RunFolder
from pretrain.run.lock import held_problem, live_holder

_NAME = "launch.lock"
_POLL_S = 0.1


@contextmanager
def launch_lock(folder: RunFolder, patience_s: float) -> Iterator[None]:
    """Hold the lock inside the `with` block. The wait for it takes at most `patience_s` seconds.

    Raises ConfigError if another launch holds the lock for longer, or if the lock file cannot be written.
    """
    path = folder.path / "launch" / _NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(storage_problem("run.dir", folder.path, error)) from error
    try:
        deadline = time.monotonic() + patience_s
        while not _lock_now(descriptor):
            if time.monotonic() > deadline:
                raise ConfigError(_refusal(folder))
            time.sleep(_POLL_S)
        text = f'{{"host": "{socket.gethostname()}", "pid": {os.getpid()}}}\n'
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
        except OSError as error:
            raise ConfigError(storage_problem("run.dir", folder.path, error)) from error
        yield
    finally:
        os.close(descriptor)


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # The file system has no locks. Rank 0's own lock still keeps two attempts apart.
        return True
    return True


def _refusal(folder: RunFolder) -> Problem:
    if (holder := live_holder(folder)) is not None:
        return held_problem(folder, holder)
    found = read_json(folder.path / "launch" / _NAME)
    who = f"process {found.get('pid')} on {found.get('host')}" if isinstance(found, dict) else "another process"
    rule = f"one launch at a time in a run folder; {who} launches here"
    return Problem(
        "run.dir", str(folder.path), rule, f"wait for it, end it (phalanx cancel {folder.path}), or choose another run.dir"
    )
