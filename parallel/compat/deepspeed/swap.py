"""Optimizer state in files (ZeRO-Infinity, arXiv 2104.07857) under DeepSpeed's stage 3, within reach of checkpoints.

DeepSpeed keeps main weights and moments of each sub-group in flat fp32 files, reads them for the update and writes them
back. In: a `GuardedEngine`. Out: the `Partition` that finds the state in those files. A checkpoint reads and writes the
files through memory maps, so that the state need not fit into the host's memory for that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from parallel.compat.deepspeed.guards import GuardedEngine
from parallel.compat.deepspeed.partition import CutParameters, FlatRange
from parallel.compat.private_names import LibraryImports, require_names

with LibraryImports(__name__):
    from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper as swapping
    from deepspeed.runtime.zero import stage3
require_names(__name__)

SMALLEST_BYTES = 4096


def swap_small_groups() -> None:
    """Let DeepSpeed swap groups below 1 MiB too. It leaves them in memory, which would be all that a rehearsal's model has."""
    stage3.PartitionedOptimizerSwapper = SmallGroupSwapper  # type: ignore[misc]


class SmallGroupSwapper(swapping.PartitionedOptimizerSwapper):
    """DeepSpeed's swapper, for small groups too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.min_aio_bytes = SMALLEST_BYTES


class SwappedParameters(CutParameters):
    """Stage 3 with the state of all but the smallest sub-groups in files; between updates their tensors are empty."""

    def __init__(self, runtime: GuardedEngine) -> None:
        super().__init__(runtime)
        # `accept` hands the gradients over, once they are final.
        self.zero._finalize_offload_gradient_accumulation = lambda: None
        # By path, and whether changes reach the file.
        self._maps: dict[tuple[str, bool], np.memmap[Any, Any]] = {}
        # Where each parameter's part begins in DeepSpeed's host buffer of gradients, and where each sub-group's.
        self._starts: dict[int, int] = {}
        self._group_starts = [0]
        position = 0
        for parameters in self.zero.fp16_groups:
            for parameter in parameters:
                self._starts[id(parameter)] = position
                position += parameter.partition_numel()
            self._group_starts.append(position)

    def begin(self) -> None:
        super().begin()
        self._maps.clear()

    def gradients(self) -> list[torch.Tensor]:
        whole = self.zero.grad_partitions_flat_buffer
        starts = [self._starts[id(held.parameter)] for held in self.ranges]
        return [whole[start : start + held.stop - held.start] for start, held in zip(starts, self.ranges, strict=True)]

    def accept(self, norm: torch.Tensor) -> None:
        """The gradients stay in host memory, where they are, until the update copies them.

        Fault (deepspeed 0.19.8): it writes each parameter's to a file and reads them back to where they lie in the sub-group's
        buffer. With widths that don't fill whole blocks the update then used other gradients: wrong from the first step, no
        error.
        """
        super().accept(norm)
        whole = self.zero.grad_partitions_flat_buffer
        for group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            gradient = whole[self._group_starts[group] : self._group_starts[group + 1]].to(torch.float32)
            if self._is_swapped(group):
                self.zero.optimizer_swapper.swap_params_info[flat.ds_id].unswapped_gradients = {0: gradient}
            else:
                flat.grad.copy_(gradient)

    def values(self, held: FlatRange, writable: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not self._is_swapped(held.group):
            return super().values(held, writable)
        name: str = held.flat.ds_id  # type: ignore[attr-defined]
        found = {}
        for context in self.zero.optimizer_swapper.swap_params_info[name].tensors:
            # The weights are named like the sub-group, a moment exp_avg-GROUP.
            kind = context.compute_tensor.ds_id.removesuffix(name).removesuffix("-")
            found[kind] = held.part_of(torch.from_numpy(self._map(context.swap_path, writable)))
        return found.pop(""), found

    def _map(self, path: str, writable: bool) -> np.memmap[Any, Any]:
        """The file [elements, padded]; DeepSpeed wrote past the page cache, so a map must be younger than that."""
        found = self._maps.get((path, writable))
        if found is None:
            found = self._maps[path, writable] = np.memmap(path, dtype=np.float32, mode="r+" if writable else "c")
        return found

    def _make_moments(self, group: int, flat: torch.Tensor) -> None:
        if not self._is_swapped(group):
            super()._make_moments(group, flat)
        elif flat not in self.adam.state:
            self.zero._optimizer_states_and_gradient_swap_in(group)
            super()._make_moments(group, flat)
            self.zero._optimizer_states_and_gradient_swap_out(group)

    def publish(self) -> None:
        for (_, writable), values in self._maps.items():
            if writable:
                values.flush()
        self._maps.clear()
        super().publish()

    def _publish_group(self, group: int) -> None:
        if self._is_swapped(group):
            self.zero._optimizer_states_and_gradient_swap_in(group)
        super()._publish_group(group)
        if self._is_swapped(group):
            self.zero._release_swap_buffers(group)

    def _is_swapped(self, group: int) -> bool:
        return self.zero._swappable_optimizer_subgroup(group)
