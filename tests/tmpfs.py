"""A small file system in memory, to be filled. In: a folder and a size. Out: the folder, mounted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs at `folder`, which is made. `size`: as mount takes it, such as 4m. Skips the test without root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        # Lazily: a run that a failing test leaves behind still has files open there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
