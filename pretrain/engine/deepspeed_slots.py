"""DeepSpeed's state on this rank, as slots of canonical tensors.

In: a `Partition` of parallel/compat/deepspeed/partition.py and the shards of this rank's parameters. Out: one `ZeroSlot` for
each range, in the order of the partition's gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from parallel.compat.deepspeed.partition import FlatRange, Partition
from pretrain.engine.base import WEIGHT
from pretrain.engine.slots import Slot
from pretrain.model.shards import Shard


@dataclass(frozen=True)
class ZeroSlot(Slot):
    """A slot whose main weights are a range of DeepSpeed's flat tensors."""

    flat_range: FlatRange

    @property
    def parameter(self) -> nn.Parameter:
        return self.flat_range.parameter

    def values(self, partition: Partition, writable: bool = False) -> dict[str, torch.Tensor]:
        """Main weights and moments by kind, each [stop - start].

        `writable`: the caller writes them in place, and the partition publishes them afterwards.
        """
        main, moments = partition.values(self.flat_range, writable)
        return {WEIGHT: main, **moments}


def make_slots(partition: Partition, shards: Mapping[int, Shard]) -> list[ZeroSlot]:
    """The slots of a partition. `shards`: by id of the parameter."""
    return [ZeroSlot(shards[id(part.parameter)], part.main, part.start, part.stop, part) for part in partition.ranges]
