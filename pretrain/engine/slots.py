"""What an engine's rank holds of canonical tensors, and who writes what all data-parallel ranks hold. Both engines use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pretrain.engine.base import Piece
from pretrain.model.shards import Shard


@dataclass(frozen=True)
class Slot:
    """fp32 main weights (or a buffer) that this rank holds: the flat range [start, stop) of a local tensor."""

    shard: Shard
    main: torch.Tensor
    start: int
    stop: int

    def pieces(self, values: dict[str, torch.Tensor]) -> Iterator[Piece]:
        """Each value, shaped like `main`, cut at the boxes of the canonical tensor; `data` shares its memory."""
        for kind, value in values.items():
            flat = value.detach().view(-1)
            for position, box, start, stop in self.shard.pieces(self.start, self.stop):
                data = flat[position - self.start : position - self.start + stop - start]
                yield Piece(kind, self.shard.name, self.shard.global_shape, box, start, stop, data)


class ReplicaWriters:
    """Which data-parallel rank writes a tensor that all of them hold: the one with the least to write so far.

    Every rank asks in the same order and gets the same answer, without a message.
    """

    def __init__(self) -> None:
        self.loads: dict[int, list[int]] = {}

    def assign(self, shard: Shard, numel: int) -> int:
        loads = self.loads.setdefault(shard.num_data, [0] * shard.num_data)
        rank = loads.index(min(loads))
        loads[rank] += numel
        return rank
