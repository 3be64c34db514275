"""Temporary folders of a launch on this machine. In: a purpose. Out: a folder that is removed with its owner.

A killed owner leaves its folder behind, and the next owner removes it. A lock of the kernel shows whether an owner is alive.
A pid could not: containers may share /dev/shm without sharing pids.

Torch-free.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError, Problem

_MEMORY = Path("/dev/shm")
_OWNER = "owner"
# A folder without a lock may still be younger than this: its owner is about to lock it.
_YOUNG_S = 60.0
# A place in memory must take this much: heartbeats and stacks of the ranks of a node.
_NEEDED_BYTES = 1 << 20


@contextmanager
def scratch_folder(purpose: str, in_memory: bool = False) -> Iterator[Path]:
    """A new folder, readable by this user only. `in_memory` is for small files that are written often.

    Places are /dev/shm (in memory) and the temporary folder (TMPDIR). The first one with room is taken. Raises ConfigError,
    which names every place and its fault, if there is none.
    """
    places = [*([_MEMORY] if in_memory else []), Path(_temporary_folder())]
    prefix, faults = f"phalanx-{os.getuid()}-{purpose}-", {}
    for place in dict.fromkeys(places):
        try:
            folder, owner = _make(place, prefix)
        except OSError as error:
            faults[place] = error.strerror or str(error)
            continue
        break
    else:
        said = "; ".join(f"{place}: {fault}" for place, fault in faults.items())
        rule = f"one place on this machine must take {_NEEDED_BYTES >> 20} MiB of small files ({said})"
        raise ConfigError(
            Problem("TMPDIR", os.environ.get("TMPDIR"), rule, "free some space there, or set TMPDIR to another folder")
        )
    try:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield folder
    finally:
        # Ranks that are just dying may still write here.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def _temporary_folder() -> str:
    """TMPDIR as the user set it, though it be full: Python would silently take the working folder instead."""
    return os.environ.get("TMPDIR") or "/tmp"


def _make(place: Path, prefix: str) -> tuple[Path, int]:
    """(folder, descriptor of its owner's file). Raises OSError if the place is missing, read-only or full."""
    _remove_left_behind(place, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    try:
        with open(folder / "room", "wb", buffering=0) as probe:
            # Written, not only allocated: tmpfs and network file systems notice a full disk or quota at different moments.
            written = probe.write(b"\0" * _NEEDED_BYTES)
            if written < _NEEDED_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
            os.fsync(probe.fileno())
        os.unlink(folder / "room")
        return folder, os.open(folder / _OWNER, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_left_behind(base: Path, prefix: str) -> None:
    for folder in base.glob(f"{prefix}*"):
        try:
            if time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            owner = os.open(folder / _OWNER, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            # Removed meanwhile by another launcher, or on a read-only file system.
            continue
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(owner)
