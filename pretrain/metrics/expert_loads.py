"""The load of the experts, in few numbers. In: experts.jsonl. Out: numbers by layer and step, by layer and expert.

Torch-free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pretrain.metrics.expert_counts import read_expert_counts

# Rows of a file that another tool made may be many, and the numbers have to stay few.
_MOST_ROWS = 512
_MOST_NUMBERS = 40_000
_SNAPSHOTS = 6


def expert_loads(path: Path) -> dict[str, Any] | None:
    """None: the file has no rows. Raises OSError.

    By layer and step: `ratio`, the largest load over the mean; `entropy` of the load over its largest possible value, 0 to 1;
    `dead`, experts without a token. `snapshots`: loads over their mean at a few steps, [layers][experts].
    """
    steps: list[int] = []
    parts: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    layers: list[int] = []
    for row in read_expert_counts(path):
        counts = np.array(row["counts"], dtype=np.float64)
        if row["layers"] != layers or (parts and counts.shape != parts[-1].shape):
            # Another model was trained here, or the file is foreign: what follows counts.
            steps, parts, layers = [], [], row["layers"]
        steps.append(row["step"])
        parts.append(counts)
        if len(parts) > _MOST_ROWS:
            del steps[::2], parts[::2]
    if not parts:
        return None
    every = max(1, -(-3 * len(parts) * len(layers) // (2 * _MOST_NUMBERS)))
    steps, parts = steps[::-every][::-1], parts[::-every][::-1]
    loads = np.stack(parts)
    mean = np.maximum(loads.mean(axis=2), 1e-12)
    share = loads / np.maximum(loads.sum(axis=2, keepdims=True), 1e-12)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=2) / max(np.log(loads.shape[2]), 1e-12)
    number = max(1, min(_SNAPSHOTS, len(parts), _MOST_NUMBERS // loads[0].size))
    chosen = sorted({round(index) for index in np.linspace(len(parts) - 1, 0, number)})
    return {
        "steps": steps,
        "layers": layers,
        "experts": loads.shape[2],
        "ratio": np.round((loads.max(axis=2) / mean).T, 3).tolist(),
        "entropy": np.round(entropy.T, 4).tolist(),
        "dead": (loads == 0).sum(axis=2).T.tolist(),
        "snapshots": [{"step": steps[i], "load": np.round(loads[i] / mean[i][:, None], 2).tolist()} for i in chosen],
    }
