"""The parts of canonical tensors that an engine has on this rank, and the choice of the rank that writes shared ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pretrain.engine.base import StateSlice
from pretrain.model.shards import Shard


@dataclass(frozen=True)
class Slot:
    """The flat range [start, stop) of a local tensor on this rank. `main`: its fp32 main weights, or a buffer."""

    shard: Shard
    main: torch.Tensor
    start: int
    stop: int

    def state_slices(self, values: dict[str, torch.Tensor]) -> Iterator[StateSlice]:
        """Cut each value at the borders of the canonical tensor's slices.

        `values`: tensors with the shape of `main`, by kind. The `data` of the results shares their memory.
        """
        for kind, value in values.items():
            flat = value.detach().view(-1)
            for position, slice_, start, stop in self.shard.slice_ranges(self.start, self.stop):
                data = flat[position - self.start : position - self.start + stop - start]
                yield StateSlice(kind, self.shard.name, self.shard.global_shape, slice_, start, stop, data)


class ReplicaWriters:
    """Chooses the data-parallel rank that writes a tensor which all of them have: the rank with the fewest elements so far.

    All ranks ask in the same order, so they get the same answer without communication.
    """

    def __init__(self) -> None:
        self.loads: dict[int, list[int]] = {}

    def assign(self, shard: Shard, numel: int) -> int:
        """The data rank that writes these `numel` elements."""
        loads = self.loads.setdefault(shard.num_data, [0] * shard.num_data)
        rank = loads.index(min(loads))
        loads[rank] += numel
        return rank
