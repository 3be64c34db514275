"""Where the shuffled orders of large data are kept, and from which size on.

Torch-free.
"""

from __future__ import annotations

from pathlib import Path

from configs.schema import Data

CACHED_ENTRIES = 1 << 22


def cache_folder(data: Data, prefix: str) -> Path:
    """Where the shuffled indices of one part are kept."""
    return Path(data.cache_dir) if data.cache_dir else Path(f"{prefix}.cache")


def needs_cache(sequences: int, samples: int) -> bool:
    """Whether an epoch's indices (16 bytes an entry) are worth a file that the ranks share; smaller ones are remade in 0.2 s."""
    return sequences + samples >= CACHED_ENTRIES
