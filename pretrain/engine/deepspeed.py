"""Engine `deepspeed`: DeepSpeed's ZeRO 0 to 3, with offload, under Megatron-Core's schedules.

DeepSpeed partitions the state, reduces gradients over data-parallel ranks and updates the weights. The engine does the rest
once a step on the partitioned gradients: the sums over tensor ranks, the shared embedding, the norm, clipping and the expert
bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from configs.schema import Config
from parallel.compat.deepspeed.partition import CutParameters, FlatGroups, Partition, Replicated
from parallel.compat.deepspeed.swap import SwappedParameters
from parallel.compat.megatron_private import clear_step_tensors, update_expert_bias
from pretrain.data.batches import MicroBatch
from pretrain.engine import deepspeed_gradients as finish
from pretrain.engine.base import MOMENTUM, WEIGHT, Accept, StateSlice, StepResult, is_finite
from pretrain.engine.deepspeed_runtime import make_runtime
from pretrain.engine.deepspeed_slots import ZeroSlot, make_slots
from pretrain.engine.deepspeed_swap import swaps
from pretrain.engine.muon import make_muon
from pretrain.engine.qk_clip import make_qk_clip
from pretrain.engine.schedule_step import PipelineSchedule
from pretrain.engine.slots import ReplicaWriters, Slot
from pretrain.model.attention_logits import make_attention_logits
from pretrain.model.shards import Shard, local_tensors, map_shards


class DeepSpeedZero:
    """Owns the gradients and the optimizer state of this rank's chunks, through one DeepSpeed engine for all of them."""

    name = "deepspeed"

    def __init__(self, config: Config, chunks: Sequence[GPTModel], groups: ProcessGroupCollection, device: torch.device) -> None:
        self.config, self.chunks, self.groups, self.device = config, list(chunks), groups, device
        self.zero_stage = config.zero.stage
        self.schedule = PipelineSchedule(config, groups, device)
        self.transformer = chunks[0].config
        # The shards are mapped before DeepSpeed starts: at stage 3 parameters lose their shapes.
        shards = [map_shards(chunk, groups) for chunk in chunks]
        by_id = {
            id(tensor): shards[index][name] for index, chunk in enumerate(chunks) for name, tensor in chunk.named_parameters()
        }
        self.tensor_partial = {number for chunk in chunks for number in finish.tensor_partial(chunk)}
        gradient_device = device if config.zero.offload == "none" else torch.device("cpu")
        self.embedding = finish.SharedEmbedding(chunks, groups, self.zero_stage > 0, gradient_device)
        self.runtime, self.models = make_runtime(config, chunks, groups, device, by_id)
        self.runtime.before_update = self._finish_gradients
        kinds: tuple[type[Partition], ...] = (Replicated, FlatGroups, FlatGroups, CutParameters)
        kind = SwappedParameters if swaps(config) else kinds[self.zero_stage]
        self.partition = kind(self.runtime)
        self.slots = make_slots(self.partition, by_id)
        self.adam = self.partition.adam
        self.buffers = [
            Slot(shards[index][name], tensor, 0, tensor.numel())
            for index, chunk in enumerate(chunks)
            for name, tensor in local_tensors(chunk)
            if id(tensor) not in by_id
        ]
        self.muon = make_muon(config, self.slots, shards, groups, device)
        self.logits = make_attention_logits(config, chunks, groups)
        self.clip = make_qk_clip(config, self.slots, self.logits)
        self.updates = 0

    # A step.

    def step(self, batches: Sequence[MicroBatch], learning_rate: float, accept: Accept = is_finite) -> StepResult:
        num_tokens = int(self.schedule.count_tokens(batches))
        # The loss is a sum over tokens, and DeepSpeed averages gradients over data-parallel ranks. The schedule applies this
        # scale to the main loss, the losses of multi-token prediction and those of the routers.
        scale = self.groups.dp_cp.size() / max(num_tokens, 1)
        self.transformer.grad_scale_func = lambda loss: loss * scale
        self.partition.begin()
        if self.logits is not None:
            self.logits.begin()
        loss_sum, _ = self.schedule.run(self.models, batches, forward_only=False)
        if self.logits is not None:
            self.logits.gather()
        self.loss = loss_sum / max(num_tokens, 1)
        self.learning_rate = learning_rate
        for group in self.adam.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
        self.accept, self.applied = accept, False
        self.runtime.step()
        if self.applied:
            self.updates += 1
            update_expert_bias(self.chunks, self.transformer)
        clear_step_tensors(self.chunks, self.transformer)
        return StepResult(self.loss, self.grad_norm, num_tokens, self.applied, self.schedule.source_losses)

    def _finish_gradients(self) -> bool:
        """DeepSpeed's step() calls this when gradients are reduced over data-parallel ranks. False: it makes no update."""
        slots, gradients = self.slots, self.partition.gradients()
        partial = [gradient for slot, gradient in zip(slots, gradients, strict=True) if id(slot.parameter) in self.tensor_partial]
        finish.sum_over_tensor_ranks(partial, self.groups.tp)
        self.embedding.reduce(slots, gradients)
        norm = finish.global_norm(slots, gradients, self.zero_stage > 0, self.device)
        self.grad_norm = float(norm)
        self.applied = self.accept(self.loss, self.grad_norm)
        if self.applied:
            finish.clip(gradients, self.config.optimizer.clip_grad_norm, self.grad_norm)
            if self.muon is not None:
                by_slot = {id(slot): gradient for slot, gradient in zip(slots, gradients, strict=True)}
                self.muon.step(by_slot, self.learning_rate)
            if self.clip is not None:
                self.clip.apply()
            self.partition.accept(norm)
        else:
            self.partition.discard()
        return self.applied

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        self.runtime.eval()
        with torch.no_grad():
            result = self.schedule.run(self.models, batches, forward_only=True)
        self.runtime.train()
        return result

    # State.

    def owned_state(self) -> Iterator[StateSlice]:
        writers = ReplicaWriters()
        for slot in self.slots:
            if self._writes(slot.shard, slot.main.numel() if self.zero_stage == 0 else None, writers):
                yield from slot.state_slices(self._values(slot))
        for slot in self.buffers:
            if self._writes(slot.shard, slot.main.numel(), writers):
                yield from slot.state_slices({WEIGHT: slot.main})

    def _momentum_of(self, slot: Slot) -> torch.Tensor | None:
        return self.muon.momentum_of(slot) if self.muon is not None else None

    def _values(self, slot: ZeroSlot, writable: bool = False) -> dict[str, torch.Tensor]:
        """Main weights and optimizer state by kind, each [stop - start]."""
        momentum = self._momentum_of(slot)
        return slot.values(self.partition, writable) if momentum is None else {WEIGHT: slot.main, MOMENTUM: momentum}

    def _writes(self, shard: Shard, shared_elements: int | None, writers: ReplicaWriters) -> bool:
        """Whether this rank writes the tensor.

        `shared_elements`: the number of elements that all data-parallel ranks have; None: only this rank has them.
        """
        mine = shared_elements is None or writers.assign(shard, shared_elements) == shard.data_rank
        return mine and not shard.tensor_replica and not shard.duplicate

    def local_state(self, with_optimizer: bool) -> Iterator[StateSlice]:
        if with_optimizer:
            self.partition.make_moments({id(slot.flat_range.flat) for slot in self.slots if self._momentum_of(slot) is not None})
        for slot in self.slots:
            values = self._values(slot, writable=True)
            yield from slot.state_slices(values if with_optimizer else {WEIGHT: values[WEIGHT]})
        for slot in self.buffers:
            yield from slot.state_slices({WEIGHT: slot.main})

    def loaded(self, optimizer_steps: int | None) -> None:
        self.updates = optimizer_steps or 0
        if optimizer_steps is not None:
            for flat, state in self.adam.state.items():
                state["step"] = self._step_count(flat, optimizer_steps)
        self.partition.publish()

    def _step_count(self, flat: torch.Tensor, steps: int) -> torch.Tensor | int:
        """The step count as the optimizer keeps it: an int in DeepSpeed's CPU Adam, a tensor in torch's AdamW.

        The fused AdamW needs the tensor on the device.
        """
        if not isinstance(self.adam, torch.optim.AdamW):
            return steps
        return torch.tensor(float(steps), device=flat.device if self.adam.defaults["fused"] else None)

    def optimizer_steps(self) -> int:
        return self.updates
