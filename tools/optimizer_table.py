"""Which parameters Muon updates and which AdamW does, for `phalanx check`.

In: a config and its vocabulary size. Out: one row for each kind of tensor, with counts. Layers of a kind share a row.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from configs.schema import Config
from parallel.muon import split_rows, updates_with_muon
from tools.convert.tensors.canonical_shapes import tensor_shapes


@dataclass(frozen=True)
class OptimizerRow:
    """Tensors of one kind. `updater`: muon or adamw. `matrices`: how many Muon orthogonalises; 0 under AdamW."""

    updater: str
    name: str
    tensors: int
    matrices: int
    parameters: int


def optimizer_rows(config: Config, vocab_size: int) -> list[OptimizerRow]:
    """The rows of a model: Muon's first, each in the order of the model."""
    rows: dict[tuple[str, str], OptimizerRow] = {}
    for name, shape in tensor_shapes(replace(config.model, vocab_size=vocab_size)).items():
        if name.endswith(".expert_bias"):
            continue  # a buffer, which no optimizer updates
        is_muons = updates_with_muon(name, shape, config.optimizer)
        kind = re.sub(r"\.\d+\.", ".*.", name)
        key = ("muon" if is_muons else "adamw", kind)
        matrices = (
            len(split_rows(name, shape[-2], config.model, config.optimizer.muon)) * (shape[0] if len(shape) == 3 else 1)
            if is_muons
            else 0
        )
        row = rows.get(key, OptimizerRow(*key, 0, 0, 0))
        rows[key] = OptimizerRow(*key, row.tensors + 1, row.matrices + matrices, row.parameters + prod(shape))
    return sorted(rows.values(), key=lambda row: row.updater != "muon")


def optimizer_json(rows: Sequence[OptimizerRow]) -> dict[str, Any]:
    """Parameters by optimizer, and the rows."""
    return {
        "parameters": {name: sum(row.parameters for row in rows if row.updater == name) for name in ("muon", "adamw")},
        "rows": [asdict(row) for row in rows],
    }


def optimizer_lines(rows: Sequence[OptimizerRow]) -> list[str]:
    """The table as text."""
    lines = []
    for updater in ("muon", "adamw"):
        chosen = [row for row in rows if row.updater == updater]
        tensors, parameters = sum(row.tensors for row in chosen), sum(row.parameters for row in chosen)
        matrices = f", {sum(row.matrices for row in chosen):,} matrices" if updater == "muon" else ""
        lines.append(f"{updater:<8} {parameters:,} parameters in {tensors:,} tensors{matrices}")
        width = max((len(row.name) for row in chosen), default=0)
        for row in chosen:
            matrices = f"  {row.matrices:>8,} matrices" if updater == "muon" else ""
            lines.append(f"         {row.name:<{width}}  {row.tensors:>5,} x{matrices}  {row.parameters:>16,}")
    return lines
