"""Engine `megatron`: Megatron-Core's DDP, with its plain AdamW at ZeRO 0 and its distributed AdamW at ZeRO 1.

With optimizer.kind = muon, Muon updates its parameters just before AdamW updates the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection

from configs.schema import Config
from parallel.compat.megatron_private import publish_main_weights, sharded_main
from parallel.mup import learning_rate_factor
from pretrain.data.batches import MicroBatch
from pretrain.engine.base import MOMENTS, MOMENTUM, WEIGHT, Accept, StateSlice, StepResult, is_finite
from pretrain.engine.muon import hide_in_step, make_muon
from pretrain.engine.qk_clip import make_qk_clip
from pretrain.engine.schedule_step import PipelineSchedule
from pretrain.engine.slots import ReplicaWriters, Slot
from pretrain.model.attention_logits import make_attention_logits
from pretrain.model.megatron_config import DTYPES
from pretrain.model.shards import Shard, local_tensors, map_shards


class MegatronEngine:
    """Owns the gradient buffers and the optimizer state of this rank's chunks."""

    name = "megatron"

    def __init__(self, config: Config, chunks: Sequence[GPTModel], groups: ProcessGroupCollection, device: torch.device) -> None:
        self.config = config
        self.zero_stage = config.zero.stage
        self.schedule = PipelineSchedule(config, groups, device)
        self.shards = [map_shards(chunk, groups) for chunk in chunks]
        self.tensors = [dict(local_tensors(chunk)) for chunk in chunks]
        transformer = chunks[0].config
        transformer.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(
            overlap_grad_reduce=config.zero.overlap_grad_reduce,
            overlap_param_gather=config.zero.overlap_param_gather,
            use_distributed_optimizer=self.zero_stage == 1,
            grad_reduce_in_fp32=config.precision.grads == "fp32",
        )
        self.models = [
            # Only the first chunk's buckets overlap with the backward pass.
            DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=index > 0, pg_collection=groups)
            for index, chunk in enumerate(chunks)
        ]
        if config.zero.overlap_grad_reduce:
            no_sync = [model.no_sync for model in self.models]
            transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # type: ignore[assignment]
        options = self._optimizer_config()
        optimizer = get_megatron_optimizer(options, self.models, self._overrides(options, chunks), use_gloo_process_groups=False)  # type: ignore[arg-type]
        assert isinstance(optimizer, ChainedOptimizer), "megatron-core 0.16.1 chains dense and expert optimizers"
        self.optimizer = optimizer
        self.slots = self._make_slots()
        modules = [module for chunk in chunks for module in chunk.modules()]
        self.biased = [module for module in modules if getattr(module, "expert_bias", None) is not None]
        self.muon = make_muon(config, [slot for slot in self.slots if slot.part], self.shards, groups, device)
        if self.muon is not None:
            mains = {id(slot.main) for slot in self.muon.slots}
            for part in self._parts():
                hide_in_step(part.optimizer, lambda _, parameter: id(parameter) in mains)
        self.logits = make_attention_logits(config, chunks, groups)
        self.clip = make_qk_clip(config, self.slots, self.logits)
        self.updates = 0

    def _optimizer_config(self) -> OptimizerConfig:
        config, optimizer = self.config, self.config.optimizer
        dtype = DTYPES[config.precision.params]
        return OptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad_norm,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=self.zero_stage == 1,
            overlap_param_gather=config.zero.overlap_param_gather,
        )

    def _overrides(self, options: OptimizerConfig, chunks: Sequence[GPTModel]) -> dict[ParamKey, ParamGroupOverride]:
        """Values of parameter groups that differ: no decay for vectors, and the learning rates of model.mup."""
        factors = {
            id(parameter): learning_rate_factor(shards[name].name, len(shards[name].global_shape), self.config.model)
            for chunk, shards in zip(chunks, self.shards, strict=True)
            for name, parameter in chunk.named_parameters()
        }
        overrides = get_standard_config_overrides(options)
        for factor in sorted(set(factors.values()) - {1.0}):

            def has_factor(parameter: torch.nn.Parameter, factor: float = factor) -> bool:
                return factors[id(parameter)] == factor

            chosen = ParamPredicate(f"learning rate x {factor}", has_factor)
            overrides[ParamKey(predicate=chosen)] = ParamGroupOverride(lr_mult=factor)  # type: ignore[typeddict-unknown-key]
        return overrides

    def step(self, batches: Sequence[MicroBatch], learning_rate: float, accept: Accept = is_finite) -> StepResult:
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Megatron-Core changes the expert bias, a few numbers a layer, in the backward pass. A refused step restores it.
        biases = [bias.clone() for bias in self._expert_biases()]
        if self.logits is not None:
            self.logits.begin()
        loss_sum, num_tokens = self.schedule.run(self.models, batches, forward_only=False)
        if self.logits is not None:
            self.logits.gather()
        loss = loss_sum / max(num_tokens, 1)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        applied = accept(loss, grad_norm)
        if applied:
            self._update(grad_norm, learning_rate)
        else:
            for bias, before in zip(self._expert_biases(), biases, strict=True):
                bias.copy_(before)
        return StepResult(loss, grad_norm, num_tokens, applied, self.schedule.source_losses)

    def _expert_biases(self) -> list[torch.Tensor]:
        return [module.get_buffer("expert_bias") for module in self.biased]

    def _update(self, grad_norm: float, learning_rate: float) -> None:
        clip, decay = self.config.optimizer.clip_grad_norm, self.config.optimizer.weight_decay
        for group in self.optimizer.param_groups:
            factor = group.get("lr_mult", 1.0)
            group["lr"] = learning_rate * factor
            group["weight_decay"] = decay * group.get("wd_mult", 1.0) / factor
        for part in self._parts():
            parameters: list[torch.Tensor] = list(part.get_parameters())
            if clip > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, clip, grad_norm)
        if self.muon is not None:
            self.muon.step({id(slot): _gradient(slot) for slot in self.muon.slots}, learning_rate)
        if self.clip is not None:
            self.clip.apply()
        self.optimizer.step_with_ready_grads()
        self.updates += 1

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        for model in self.models:
            model.eval()
        with torch.no_grad():
            result = self.schedule.run(self.models, batches, forward_only=True)
        for model in self.models:
            model.train()
        return result

    def _parts(self) -> list[MegatronOptimizer]:
        return [part for part in self.optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]

    # State: which part of which parameter this rank's optimizer holds.

    def _make_slots(self) -> list[OptimizerSlot]:
        slots = []
        for shards, tensors in zip(self.shards, self.tensors, strict=True):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.nn.Parameter):
                    slots += self._parameter_slot(shards[name], tensor)
                else:
                    slots.append(OptimizerSlot(shards[name], tensor, 0, tensor.numel(), None))
        return slots

    def _parameter_slot(self, shard: Shard, parameter: torch.nn.Parameter) -> list[OptimizerSlot]:
        for part in self._parts():
            if isinstance(part, DistributedOptimizer):
                if found := sharded_main(part, parameter):
                    return [OptimizerSlot(shard, *found, part)]
            else:
                main = getattr(parameter, "main_param", parameter)
                if any(main is other for group in part.optimizer.param_groups for other in group["params"]):
                    return [OptimizerSlot(shard, main, 0, parameter.numel(), part)]
        assert self.zero_stage == 1, f"{shard.name} has no optimizer"
        return []  # its whole state is on other data-parallel ranks

    def owned_state(self) -> Iterator[StateSlice]:
        writers = ReplicaWriters()
        for slot in self.slots:
            shard = slot.shard
            whole = self.zero_stage == 0 or slot.part is None
            mine = not whole or writers.assign(shard, slot.main.numel()) == shard.data_rank
            if mine and not shard.tensor_replica and not shard.duplicate:
                yield from slot.state_slices({WEIGHT: slot.main, **self._optimizer_state(slot)})

    def _optimizer_state(self, slot: OptimizerSlot) -> dict[str, torch.Tensor]:
        if self.muon is not None and (momentum := self.muon.momentum_of(slot)) is not None:
            return {MOMENTUM: momentum}
        state = slot.part.optimizer.state.get(slot.main, {}) if slot.part else {}
        return {kind: state[kind] for kind in MOMENTS if kind in state}

    def local_state(self, with_optimizer: bool) -> Iterator[StateSlice]:
        for slot in self.slots:
            values = {WEIGHT: slot.main}
            if with_optimizer and slot.part:
                if self._is_adams(slot):
                    moments = {kind: torch.zeros_like(slot.main, dtype=torch.float32) for kind in MOMENTS}
                    slot.part.optimizer.state[slot.main] = moments
                values |= self._optimizer_state(slot)
            yield from slot.state_slices(values)

    def loaded(self, optimizer_steps: int | None) -> None:
        self.updates = optimizer_steps or 0
        for slot in self.slots:
            if slot.part and optimizer_steps is not None and self._is_adams(slot) and not self._counts_in_groups(slot.part):
                slot.part.optimizer.state[slot.main]["step"] = torch.tensor(float(optimizer_steps))
        for part in self._parts():
            if self._counts_in_groups(part):
                for group in part.optimizer.param_groups:
                    group["step"] = self.updates
            publish_main_weights(part)
        if self.zero_stage == 1:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def _is_adams(self, slot: OptimizerSlot) -> bool:
        return self.muon is None or self.muon.momentum_of(slot) is None

    @staticmethod
    def _counts_in_groups(part: MegatronOptimizer) -> bool:
        """Whether the optimizer counts its steps for each group, as Transformer Engine's FusedAdam does.

        torch's AdamW counts them for each tensor.
        """
        return type(part.optimizer).__name__ == "FusedAdam"

    def optimizer_steps(self) -> int:
        return self.updates


@dataclass(frozen=True)
class OptimizerSlot(Slot):
    """`part`: the optimizer that updates `main`. None: `main` is a buffer."""

    part: MegatronOptimizer | None


def _gradient(slot: Slot) -> torch.Tensor:
    assert slot.main.grad is not None, "megatron-core gives every main weight a gradient"
    return slot.main.grad
