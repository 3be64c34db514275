"""What an import reads from, whatever wrote it: tensors by name, the model, and the map between their rows.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.errors import Problem
from configs.model_schema import Model
from configs.schema import Config
from parallel.legality import experts as rules_experts
from parallel.legality import model as rules_model
from tools.convert.tensors.dtypes import FLOATS, Array
from tools.convert.tensors.weight_map import WeightMap


class TensorReader(Protocol):
    """Tensors of files. Any number of threads may read at once. Reads raise DamagedFile."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read_into(self, name: str, lead: tuple[int, ...], first: int, out: Array) -> None:
        """Fill `out` [rows, columns], contiguous and of the tensor's type, with the rows of tensor[lead] from `first` on."""
        ...

    def close(self) -> None: ...


def read_rows(files: TensorReader, name: str, lead: tuple[int, ...], first: int, rows: int) -> Array:
    """Rows [first, first + rows) of tensor[lead] as [rows, columns], in the tensor's type. A vector has one column."""
    out = np.empty((rows, prod(files.shape(name)[len(lead) + 1 :])), dtype=FLOATS[files.dtype(name)])
    files.read_into(name, lead, first, out)
    return out


@dataclass
class ImportSource:
    """A checked folder of weights.

    `kind`: family or format. `identity`: plain values that differ from those of any other source. `companions`: keep its
    config.json and tokenizer files.
    """

    folder: Path
    kind: str
    model: Model
    files: TensorReader
    weight_map: WeightMap
    identity: Any
    num_tensors: int
    companions: bool
    notes: list[str]


def check_model(model: Model, fix: str) -> list[Problem]:
    """Problems that keep Megatron-Core from building the model, by the rules of `phalanx check`.

    `fix`: what an import can do about them. The rules' own fixes change the model, which would change its outputs.
    """
    config = Config(model=model)
    config.batch.seq_length_tokens = min(config.batch.seq_length_tokens, model.max_position_tokens or 1 << 30)
    rules = (*rules_model.RULES, *rules_experts.RULES)
    return [replace(problem, fix=fix) for rule in rules for problem in rule.check(config)]
