"""The check for disk space. In: config, vocabulary size, run folder. Out: a problem when one checkpoint doesn't fit.

Torch-free.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from configs.errors import Problem
from configs.schema import Config
from parallel.architecture import padded_vocab
from parallel.flops import count_parameters
from parallel.muon import muon_parameters
from pretrain.run.folder import RunFolder, unfinished_folders

# Bytes of a parameter in a checkpoint: its fp32 value with both moments, and its bf16 weight if it has one. Muon has one moment.
STATE_BYTES, BF16_BYTES, MOMENT_BYTES = 12, 2, 4


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Size of one checkpoint in bytes. It doesn't depend on the layout, because every element is written once."""
    parameters = count_parameters(config.model, padded_vocab(config.model, vocab_size))
    each = STATE_BYTES + (BF16_BYTES if config.precision.params == "bf16" else 0)
    return (parameters.total + parameters.mtp) * each - MOMENT_BYTES * muon_parameters(config.model, config.optimizer)


def free_bytes(path: Path) -> int:
    """Free bytes for this user on the file system of a path. The path need not exist."""
    here = path.absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def reclaimed_bytes(folder: RunFolder) -> int:
    """The size of unfinished saves in the run folder, which the start deletes. A file that cannot be read counts as 0."""
    total = 0
    for unfinished in unfinished_folders(folder.checkpoints):
        for parent, _, names in os.walk(unfinished):
            for name in names:
                try:
                    # Blocks, because a file that was being written may have holes.
                    total += os.lstat(os.path.join(parent, name)).st_blocks * 512
                except OSError:
                    continue
    return total


def check_disk_space(config: Config, vocab_size: int, folder: RunFolder) -> list[Problem]:
    """A problem when the free space is less than one checkpoint. A save is complete before an old checkpoint is deleted."""
    saves = config.checkpoint.interval_steps is not None or config.checkpoint.save_at_end
    need, free = checkpoint_bytes(config, vocab_size), free_bytes(folder.path) + reclaimed_bytes(folder)
    if not saves or free >= need:
        return []
    rule = f"one checkpoint takes {need / 1e6:,.0f} MB; the file system has {free / 1e6:,.0f} MB free"
    return [Problem("run.dir", str(folder.path), rule, "free some space, or choose another run.dir")]
