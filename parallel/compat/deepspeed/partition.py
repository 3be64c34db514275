"""Which part of which parameter DeepSpeed keeps on this rank: weights, moments, gradient. One class a way of partitioning.

In: a `GuardedEngine`. Out: `FlatRange`s, the gradient of each, and what puts loaded weights into effect. The attributes
read here are private to deepspeed 0.19.8. Stage 0 keeps whole parameters. Stages 1 and 2 flatten a group of parameters
and cut it into equal parts. Stage 3 cuts every parameter, and lays the parts of a sub-group behind each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.compat.deepspeed.guards import GuardedEngine
from parallel.compat.private_names import LibraryImports, require_names

with LibraryImports(__name__):
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401  the engine has imported both
require_names(__name__)

# The moments by the names that torch's and DeepSpeed's Adam use.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class FlatRange:
    """Elements [start, stop) of a flattened `parameter`, which this rank updates.

    `main`: its fp32 main weights, 1-D. It is the range of `flat`, the optimizer's own tensor number `group`, that begins at
    `offset`.
    """

    parameter: nn.Parameter
    main: torch.Tensor
    start: int
    stop: int
    flat: torch.Tensor
    group: int
    offset: int

    def part_of(self, value: torch.Tensor) -> torch.Tensor:
        """This range of a tensor that is laid out like `flat`; 1-D, shares memory."""
        return value.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


class Partition(ABC):
    """What a rank holds under one way of partitioning."""

    def __init__(self, runtime: GuardedEngine) -> None:
        self.runtime = runtime
        self.zero: Any = runtime.optimizer
        assert runtime.basic_optimizer is not None, "the engine was given an optimizer"
        self.adam: torch.optim.Optimizer = runtime.basic_optimizer
        self.ranges = list(self._make_ranges())

    @abstractmethod
    def _make_ranges(self) -> Iterator[FlatRange]: ...

    def begin(self) -> None:
        """Before the first micro-batch of a step."""
        return

    @abstractmethod
    def gradients(self) -> list[torch.Tensor]:
        """The reduced gradient of each range, 1-D, to be changed in place; between reduction and update only."""

    @abstractmethod
    def accept(self, norm: torch.Tensor) -> None:
        """The gradients are final: let DeepSpeed update by them, and keep it from computing a norm of its own."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the gradients of this step."""

    @abstractmethod
    def publish(self) -> None:
        """Main weights were written: bring what the model computes with up to date. Collective."""

    def values(self, held: FlatRange, writable: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(fp32 main weights of a range, its moments by name once the first update has made them); 1-D.

        `writable`: the tensors will be written in place before the next `publish`.
        """
        state = self.adam.state.get(held.flat, {})
        return held.main, {kind: held.part_of(state[kind]) for kind in MOMENTS if kind in state}

    def make_moments(self, without: Collection[int] = ()) -> None:
        """Zero moments, for `values` to find. `without`: ids of flat tensors that AdamW does not update."""
        for group, flat in {held.group: held.flat for held in self.ranges}.items():
            if id(flat) not in without:
                self._make_moments(group, flat)

    def _make_moments(self, group: int, flat: torch.Tensor) -> None:
        self.adam.state[flat] = {kind: torch.zeros_like(flat, dtype=torch.float32, requires_grad=False) for kind in MOMENTS}


def _range(parameter: nn.Parameter, start: int, stop: int, flat: torch.Tensor, group: int, offset: int) -> FlatRange:
    main = flat.detach().view(-1)[offset : offset + stop - start]
    return FlatRange(parameter, main, start, stop, flat, group, offset)


class Replicated(Partition):
    """Stage 0: every parameter is its own flat tensor."""

    def _make_ranges(self) -> Iterator[FlatRange]:
        for index, parameter in enumerate(self.runtime.parameters()):
            yield _range(parameter, 0, parameter.numel(), parameter, index, 0)

    def gradients(self) -> list[torch.Tensor]:
        return [_gradient(held.parameter).view(-1) for held in self.ranges]

    def accept(self, norm: torch.Tensor) -> None:
        """There is none without clipping."""

    def discard(self) -> None:
        self.runtime.zero_grad()

    def publish(self) -> None:
        """The model computes with the main weights."""


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "DeepSpeed gives every parameter a gradient when it reduces"
    return parameter.grad


class FlatGroups(Partition):
    """Stages 1 and 2: equal parts of flattened groups."""

    def _make_ranges(self) -> Iterator[FlatRange]:
        zero = self.zero
        for group, flat in enumerate(zero.single_partition_of_fp32_groups):
            size = zero.partition_size[group]
            first = dist.get_rank(zero.real_dp_process_group[group]) * size
            offsets = zero.round_robin_bit16_offsets[group]
            for parameter, offset in zip(zero.round_robin_bit16_groups[group], offsets, strict=True):
                low, high = max(first, offset), min(first + size, offset + parameter.numel())
                if low < high:
                    yield _range(parameter, low - offset, high - offset, flat, group, low - first)

    def begin(self) -> None:
        """Clear the gradients that offload keeps on the host.

        Fault (deepspeed 0.19.8): as at stage 3 (`CutParameters`), under stage 2 with offload.
        """
        if self.zero.cpu_offload:
            for gradient in self.zero.accumulated_grads_in_cpu.values():
                gradient.zero_()

    def gradients(self) -> list[torch.Tensor]:
        if self.zero.cpu_offload:
            return [held.part_of(held.flat.grad) for held in self.ranges]  # type: ignore[arg-type]
        found: dict[tuple[int, int], torch.Tensor] = {}
        for group, tensors in self.zero.averaged_gradients.items():
            position = 0
            for tensor in tensors:
                found[group, position] = tensor
                position += tensor.numel()
        result = [found[held.group, held.offset].view(-1) for held in self.ranges]
        assert all(gradient.numel() == held.stop - held.start for gradient, held in zip(result, self.ranges, strict=True)), (
            "deepspeed lays gradients out like the weights"
        )
        return result

    def accept(self, norm: torch.Tensor) -> None:
        self.zero.scaled_global_norm = lambda norm_type=2: norm

    def discard(self) -> None:
        # What its step() does when it finds an overflow.
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        zero.micro_step_id = -1
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
            zero.all_grad_tensors[group] = None

    def publish(self) -> None:
        self.zero.update_lp_params()


class CutParameters(Partition):
    """Stage 3: every parameter cut into equal parts, the last one padded."""

    def _make_ranges(self) -> Iterator[FlatRange]:
        zero = self.zero
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            rank = dist.get_rank(zero.sub_group_process_groups[group])
            position = 0
            for parameter in zero.fp16_groups[group]:
                size = parameter.partition_numel()
                low, high = rank * size, min(rank * size + size, parameter.ds_numel)
                if low < high:
                    yield _range(parameter, low, high, flat, group, position)
                position += size

    def begin(self) -> None:
        """Clear the gradients of the step before.

        Fault (deepspeed 0.19.8): the first backward pass of a step overwrites them, the others add. A parameter that the first
        pass doesn't reach (another virtual chunk's) adds to the step before's: wrong from the second step, no error.
        """
        self.zero.grad_partitions_flat_buffer.zero_()

    def gradients(self) -> list[torch.Tensor]:
        if self.zero.offload_optimizer:
            return [held.part_of(held.flat.grad) for held in self.ranges]  # type: ignore[arg-type]
        found: dict[int, torch.Tensor] = {}
        for group, parameters in enumerate(self.zero.fp16_groups):
            tensors = self.zero.averaged_gradients[group]
            found |= {id(parameter): tensor for parameter, tensor in zip(parameters, tensors, strict=True)}
        return [found[id(held.parameter)].view(-1)[: held.stop - held.start] for held in self.ranges]

    def accept(self, norm: torch.Tensor) -> None:
        self.zero._get_norm_groups = lambda: [norm]

    def discard(self) -> None:
        self.zero._pre_step()
        self.zero._overflow_clean_up(1.0)

    def publish(self) -> None:
        zero = self.zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            self._publish_group(group)
        # Small parameters stay gathered between steps.
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _publish_group(self, group: int) -> None:
        self.zero._reassign_or_swap_out_partitioned_parameters(group)
