"""Whether weights fit into a narrower element type, checked before anything is written.

In: planned files, and the function that fills a unit. Out: ConfigError with every tensor that would overflow. fp16 ends at
65504, bf16 and fp32 at about 3.4e38.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from configs.errors import ConfigError, Problem
from tools.convert.file_plan import PlannedFile, WriteUnit
from tools.convert.output_folder import Fill, WorkShare
from tools.convert.tensors.dtypes import FLOATS

OVERFLOW = {"F16": 65520.0, "BF16": (2 - 2.0**-8) * 2.0**127, "F32": (2 - 2.0**-24) * 2.0**127}
"""Smallest magnitude that rounds to infinity: half a step above the largest finite value."""
_SHOWN = 8


def check_range(files: Sequence[PlannedFile], share: WorkShare, workers: int, fill: Fill, has_f64: bool) -> None:
    """Raise ConfigError when finite values of this share's tensors would become infinite.

    Costs one pass over the tensors that are written as fp16, and over all of them when the source holds F64 (`has_f64`). bf16
    from fp32 is not checked: only magnitudes within 0.2% of fp32's own largest one could overflow.
    """
    wide = "F64" if has_f64 else "F32"
    checked = ("F16", "BF16", "F32") if has_f64 else ("F16",)
    units = [unit for file in files[share.index :: share.count] for unit in file.units if unit.dtype in checked]
    largest: dict[tuple[str, str], float] = {}
    with ThreadPoolExecutor(workers) as pool:
        for unit, maximum in zip(units, pool.map(lambda unit: _largest(unit, fill, wide), units)):
            key = (unit.name, unit.dtype)
            largest[key] = max(largest.get(key, 0.0), maximum)
    over = {name: maximum for (name, dtype), maximum in largest.items() if maximum >= OVERFLOW[dtype]}
    if over:
        shown = {name: f"{over[name]:.6g}" for name in sorted(over, key=lambda name: -over[name])[:_SHOWN]}
        rule = f"values must stay finite: fp16 holds magnitudes up to 65504, bf16 and fp32 up to 3.4e38; {len(over)} tensors "
        rule += "have larger ones (tensor: largest magnitude)"
        raise ConfigError(Problem("--dtype", shown, rule, "use --dtype bf16, fp32 or keep"))


def _largest(unit: WriteUnit, fill: Fill, wide: str) -> float:
    """Largest finite magnitude among the unit's values, read as type `wide`."""
    size = FLOATS[wide].itemsize
    read = replace(unit, dtype=wide, row_bytes=unit.row_bytes // FLOATS[unit.dtype].itemsize * size)
    maximum = 0.0
    for block in read.blocks():
        values = np.empty((block.rows, block.row_bytes // size), dtype=FLOATS[wide])
        fill(block, values)
        finite = np.abs(values[np.isfinite(values)])
        maximum = max(maximum, float(finite.max(initial=0.0)))
    return maximum
