"""DeepSpeed's C++ operators, compiled where they are first used (a minute or two each, once a machine)."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

from parallel.compat.private_names import LibraryImports, require_names

with LibraryImports(__name__):
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder  # pyright: ignore[reportAttributeAccessIssue]
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder
    from torch.utils.cpp_extension import _get_build_directory
require_names(__name__)


def build_adam() -> None:
    """DeepSpeed's CPU Adam."""
    build_operator(CPUAdamBuilder())


def build_async_io() -> None:
    """What swaps to a disk, and the page-locked memory that it swaps from."""
    build_operator(PinMemoryBuilder())
    build_operator(AsyncIOBuilder())


def build_operator(builder: Any) -> None:
    """Compile and load an operator, one process of a machine at a time.

    Fault (torch's cpp_extension, which DeepSpeed 0.19.8 builds with): its lock is a file that a killed process leaves
    behind, and whoever comes next waits for it for ever. Ours ends with its process; who holds it removes the other.
    """
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with open(folder.parent / f"{builder.name}.phalanx", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)
