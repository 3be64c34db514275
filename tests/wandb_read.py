"""What W&B holds of a run folder. In: the folder. Out: the steps of its `.wandb` files, with repeats, in file order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.compat.wandb_files import SegmentReader
from pretrain.metrics.wandb_steps import find_segments
from pretrain.run.folder import RunFolder


def offline_rows(run_dir: Path, wandb_id: str) -> list[dict[str, Any]]:
    """Every history row of every segment."""
    return [row for path in find_segments(RunFolder(run_dir), wandb_id) for row in SegmentReader(path).poll()]


def offline_steps(run_dir: Path, wandb_id: str) -> list[int]:
    return [int(row["step"]) for row in offline_rows(run_dir, wandb_id)]
