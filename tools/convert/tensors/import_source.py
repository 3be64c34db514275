"""What an import reads from, whatever wrote it: tensors by name, the model, and how they lie in its canonical tensors.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.errors import Problem
from configs.model_schema import Model
from configs.schema import Config
from parallel.legality.model import RULES
from tools.convert.tensors.dtypes import FLOATS, Array
from tools.convert.tensors.weight_map import WeightMap


class TensorReader(Protocol):
    """Tensors of files; reads come from any number of threads and raise DamagedFile."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read_into(self, name: str, lead: tuple[int, ...], first: int, out: Array) -> None:
        """Fill `out` [rows, columns], of the tensor's type and contiguous, with the rows of tensor[lead] from `first` on."""
        ...

    def close(self) -> None: ...


def read_rows(files: TensorReader, name: str, lead: tuple[int, ...], first: int, rows: int) -> Array:
    """Rows [first, first + rows) of tensor[lead] as [rows, columns], in its own type; a vector has one column."""
    out = np.empty((rows, prod(files.shape(name)[len(lead) + 1 :])), dtype=FLOATS[files.dtype(name)])
    files.read_into(name, lead, first, out)
    return out


@dataclass
class ImportSource:
    """A folder of weights, understood. `kind`: family or format; `identity`: what tells it from another one (plain values);
    `companions`: whether its config.json and tokenizer files are to be kept."""

    folder: Path
    kind: str
    model: Model
    files: TensorReader
    weight_map: WeightMap
    identity: Any
    num_tensors: int
    companions: bool
    notes: list[str]


def check_model(model: Model) -> list[Problem]:
    """What megatron-core can't build, by the rules of `phalanx check`."""
    config = Config(model=model)
    config.batch.seq_length_tokens = min(config.batch.seq_length_tokens, model.max_position_tokens or 1 << 30)
    return [problem for rule in RULES for problem in rule.check(config)]
