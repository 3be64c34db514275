"""Folders on this machine for the time of a launch. In: a purpose. Out: a folder that goes with its owner.

A killed owner leaves its folder behind: the next one removes it. Whose owner lives is told by the kernel's lock, not by a
pid, for containers that share /dev/shm don't share their pids.

Torch-free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")
_OWNER = "owner"
# A folder is younger than this while its owner is about to lock it.
_YOUNG_S = 60.0


@contextmanager
def scratch_folder(purpose: str, in_memory: bool = False) -> Iterator[Path]:
    """A new folder, readable by this user only. `in_memory`: for small files that are written often. Raises OSError."""
    usable = in_memory and os.access(_MEMORY, os.W_OK | os.X_OK)
    base = _MEMORY if usable else Path(tempfile.gettempdir())
    prefix = f"phalanx-{os.getuid()}-{purpose}-"
    _remove_left_behind(base, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    owner = os.open(folder / _OWNER, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield folder
    finally:
        # Ranks that are just dying may still write here.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def _remove_left_behind(base: Path, prefix: str) -> None:
    for folder in base.glob(f"{prefix}*"):
        try:
            if time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            owner = os.open(folder / _OWNER, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            # Another launcher was faster.
            continue
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(owner)
