"""The cache of shuffled orders: its folder, and from which size of data on it is used.

Torch-free.
"""

from __future__ import annotations

from pathlib import Path

from configs.schema import Data

CACHED_ENTRIES = 1 << 22


def cache_folder(data: Data, prefix: str) -> Path:
    """The folder of one part's shuffled orders: data.cache_dir, or PREFIX.cache."""
    return Path(data.cache_dir) if data.cache_dir else Path(f"{prefix}.cache")


def needs_cache(sequences: int, samples: int) -> bool:
    """Whether the ranks share an epoch's order in a file of 16 bytes an entry. A rank makes a smaller order again in 0.2 s."""
    return sequences + samples >= CACHED_ENTRIES
