"""Makes temporary folders for a launch on this machine. In: a purpose. Out: a folder that is removed when its owner ends.

A killed owner leaves its folder behind, and the next owner removes that folder. A file lock held by the kernel shows whether
an owner is alive. A pid would not show it, because containers may share /dev/shm without sharing pids.

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

from configs.errors import ConfigError, Problem
from pretrain.run.files import check_room

_MEMORY = Path("/dev/shm")
_OWNER = "owner"
# The owner of a folder younger than this may not have locked it yet.
_YOUNG_S = 60.0
# The free space that a place must have. It holds the heartbeats and stacks of the ranks of one node.
_NEEDED_BYTES = 1 << 20


@contextmanager
def scratch_folder(purpose: str, in_memory: bool = False) -> Iterator[Path]:
    """A new folder that only this user can read. It is removed at the end of the `with` block.

    `in_memory`: try /dev/shm before the temporary folder TMPDIR. Use it for small files that are written often. The folder is
    made in the first place with 1 MiB of free space. Raises ConfigError if no place has room; the error names the fault of
    each place.
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
        # Errors are ignored, because dying ranks may still write into the folder.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def _temporary_folder() -> str:
    """TMPDIR as the user set it, or /tmp.

    tempfile.gettempdir() silently returns another folder if TMPDIR is full, in the end the working folder.
    """
    return os.environ.get("TMPDIR") or "/tmp"


def _make(place: Path, prefix: str) -> tuple[Path, int]:
    """(new folder, descriptor of its owner file). Raises OSError if the place is missing, read-only or full."""
    _remove_left_behind(place, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    try:
        check_room(folder, _NEEDED_BYTES)
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
            # Another launcher has removed the folder meanwhile, or the file system is read-only.
            continue
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(owner)
