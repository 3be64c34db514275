"""A file system in memory that is soon full. In: a folder and a size. Out: the folder, mounted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """`size`: as mount has it, such as 4m. Skips the test where nobody may mount."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        # Lazily: a run that a failing test leaves behind still holds it.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
