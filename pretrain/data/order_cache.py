"""The cache of shuffled orders: its folder, from which size of data on it is used, and its files.

Torch-free.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from configs.schema import Data

logger = logging.getLogger(__name__)
CACHED_ENTRIES = 1 << 22


def cache_folder(data: Data, prefix: str) -> Path:
    """The folder of one part's shuffled orders: data.cache_dir, or PREFIX.cache."""
    return Path(data.cache_dir) if data.cache_dir else Path(f"{prefix}.cache")


def needs_cache(sequences: int, samples: int) -> bool:
    """Whether the ranks share an epoch's order in a file of 16 bytes an entry. A rank makes a smaller order again in 0.2 s."""
    return sequences + samples >= CACHED_ENTRIES


@contextmanager
def written_whole(
    folder: Path, key: str, shapes: Mapping[str, tuple[tuple[int, ...], DTypeLike]]
) -> Iterator[dict[str, np.ndarray]]:
    """Arrays in files of temporary names, memory-mapped, which are synced and renamed when the block ends without an error.

    `shapes`: (shape, element type) by name. Readers see whole files only. Files that a killed process of this machine has left
    under temporary names are removed. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_left(folder, key)
    partials = {name: folder / f"{key}.{name}.{socket.gethostname()}.{os.getpid()}.partial" for name in shapes}
    try:
        arrays = {name: _mapped(path, *shapes[name]) for name, path in partials.items()}
        yield {**arrays}
        for name, path in partials.items():
            arrays[name].flush()
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / f"{key}.{name}.npy")
    finally:
        for path in partials.values():
            path.unlink(missing_ok=True)


def load_arrays(folder: Path, key: str, shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, np.ndarray] | None:
    """Files of `written_whole`, memory-mapped. None: they don't exist, or are damaged, which is logged as a warning.

    `shapes`: None where any shape is right.
    """
    paths = {name: folder / f"{key}.{name}.npy" for name in shapes}
    if not all(path.is_file() for path in paths.values()):
        return None
    try:
        found = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}
        for name, shape in shapes.items():
            if shape not in (None, found[name].shape):
                raise ValueError(f"{name} has the shape {found[name].shape}, not {shape}")
    except (ValueError, OSError, EOFError) as error:
        logger.warning("the index cache %s/%s is damaged and is made again: %s", folder, key, error)
        return None
    return found


def _mapped(path: Path, shape: tuple[int, ...], kind: DTypeLike) -> np.memmap:
    """An array in a new file, whose room on the disk is taken at once: a full disk is an OSError here, and no fault later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(kind), shape=shape)
    with open(path, "rb+") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def _remove_left(folder: Path, key: str) -> None:
    name = re.compile(rf"{key}\.\w+\.{re.escape(socket.gethostname())}\.(\d+)\.partial")
    for path in folder.glob(f"{key}.*.partial"):
        found = name.fullmatch(path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            path.unlink(missing_ok=True)
