"""Optimizer state on NVMe under DeepSpeed's stage 3 (ZeRO-Infinity, arXiv 2104.07857). Out: its folder and its settings.

parallel/compat/deepspeed/swap.py reads and writes the state in the files of the folder.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.schema import Config, run_dir

# Elements of a sub-group, which is read, updated and written as a unit. Each rank keeps four page-locked host buffers of the
# largest sub-group, for weights, gradient and two moments: 1.6 GB.
_GROUP_ELEMENTS = 100_000_000


def swaps(config: Config) -> bool:
    """Whether this run keeps optimizer state in files."""
    return config.zero.offload != "none" and config.zero.offload_device == "nvme"


def run_folder(config: Config) -> Path:
    """The swap folder of this run on a node. Its name depends on the run folder, so that two runs can share a disk."""
    folder = str(Path(run_dir(config)).resolve())
    digest = hashlib.sha256(folder.encode()).hexdigest()[:8]
    return Path(config.zero.nvme_path or "") / f"phalanx_{config.run.name}_{digest}"


def fresh_folder(config: Config) -> Path:
    """Make this rank's empty swap folder, which is removed when the process exits. Collective.

    The files of a killed attempt are removed first.
    """
    whole = run_folder(config)
    shutil.rmtree(whole, ignore_errors=True)
    dist.barrier()
    mine = whole / f"rank_{dist.get_rank():05d}"
    mine.mkdir(parents=True)
    atexit.register(_remove, mine)
    return mine


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.rmdir()
    except OSError:
        # The folder still contains that of another rank.
        return


def swap_settings(folder: Path, cuda: bool) -> dict[str, Any]:
    """The keys of DeepSpeed's `zero_optimization` section that put optimizer state into files."""
    return {
        "offload_optimizer": {"device": "nvme", "nvme_path": str(folder), "buffer_count": 4, "pin_memory": cuda},
        "sub_group_size": _GROUP_ELEMENTS,
    }
