"""The scores of a run's checkpoints on tasks. In: one row for each evaluation. Out: evaluations.jsonl in the run folder.

The file stands beside the record, because an evaluation may end while the run trains and write at the same time as rank 0.

Torch-free.
"""

from __future__ import annotations

import os
from math import isfinite
from typing import Any

from pretrain.run.files import append_line, iterate_lines, mend_torn_line
from pretrain.run.folder import RunFolder


def append_evaluation(folder: RunFolder, row: dict[str, Any]) -> None:
    """Append a row {"step", "scores": {"TASK/METRIC": number}, …}. Raises OSError, and ValueError for NaN."""
    mend_torn_line(folder.evaluations)
    descriptor = os.open(folder.evaluations, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        append_line(descriptor, row)
    finally:
        os.close(descriptor)


def read_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows in the order of their steps. Lines that are no evaluation are left out."""
    if not folder.evaluations.exists():
        return []
    rows = [row for _, row in iterate_lines(folder.evaluations) if row is not None]
    kept = [row for row in rows if isinstance(row.get("step"), int) and isinstance(row.get("scores"), dict)]
    return sorted(kept, key=lambda row: row["step"])


def newest_scores(folder: RunFolder) -> dict[str, float]:
    """TASK/METRIC → the score of the newest step that has one."""
    found: dict[str, float] = {}
    for row in read_evaluations(folder):
        found |= {name: value for name, value in row["scores"].items() if isinstance(value, (int, float))}
    return found


def score_curves(folder: RunFolder) -> list[dict[str, Any]]:
    """{"name": TASK/METRIC, "steps", "scores", "stderr": of the newest step} for each metric; of one step the last row counts."""
    found: dict[str, dict[int, tuple[float, Any]]] = {}
    for row in read_evaluations(folder):
        errors = row["stderr"] if isinstance(row.get("stderr"), dict) else {}
        for name, value in row["scores"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
                found.setdefault(name, {})[row["step"]] = (float(value), errors.get(name))
    return [
        {
            "name": name,
            "steps": list(by_step),
            "scores": [score for score, _ in by_step.values()],
            "stderr": [*by_step.values()][-1][1],
        }
        for name, by_step in found.items()
    ]
