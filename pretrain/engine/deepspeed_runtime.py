"""DeepSpeed's engine for this rank's chunks: its configuration, its groups, its AdamW, and how a Megatron schedule calls it.

In: config, chunks, groups. Out: a `GuardedEngine`, and one module a chunk for the schedule to call. Importing DeepSpeed takes
3 s.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import deepspeed.ops.adam
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from configs.schema import Config
from parallel.compat.deepspeed.guards import (
    EXPERT_GROUP,
    GuardedEngine,
    compare_orders_within,
    gather_tied_embedding,
    place_experts,
)
from parallel.compat.deepspeed.operators import build_adam, build_async_io
from parallel.compat.deepspeed.start import start_deepspeed
from parallel.compat.deepspeed.swap import swap_small_groups
from parallel.muon import updates_with_muon
from parallel.mup import learning_rate_factor
from pretrain.engine.deepspeed_swap import fresh_folder, swap_settings, swaps
from pretrain.engine.muon import hide_in_step
from pretrain.model.shards import Shard

# In elements. DeepSpeed allocates buffers of this size even for a small model. Its default of 5e8 takes 2 GB in fp32.
_BUCKET_ELEMENTS = 50_000_000


class GroupAnswers:
    """The process groups in the form of DeepSpeed's `mpu`. DeepSpeed has no context axis, so its data axis is dp x cp."""

    def __init__(self, groups: ProcessGroupCollection) -> None:
        for name, group in (
            ("data", groups.dp_cp),
            ("model", groups.mp),
            ("tensor_model", groups.tp),
            ("pipeline_model", groups.pp),
        ):
            ranks = dist.get_process_group_ranks(group)
            answers = {"group": group, "group_ranks": ranks, "world_size": len(ranks), "rank": group.rank(), "src_rank": ranks[0]}
            for what, answer in answers.items():
                setattr(self, f"get_{name}_parallel_{what}", lambda *args, answer=answer, **kwargs: answer)


class Chunks(nn.Module):
    """All chunks of this rank as the single module that DeepSpeed takes. A call names the chunk by its index."""

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        return self.chunks[index](*args, **kwargs)


class ChunkCall(nn.Module):
    """The module that a Megatron schedule calls in the place of a chunk. It calls through DeepSpeed, so that hooks run."""

    def __init__(self, runtime: GuardedEngine, index: int, chunk: GPTModel) -> None:
        super().__init__()
        # These are not submodules, because the parameters have one owner.
        object.__setattr__(self, "runtime", runtime)
        object.__setattr__(self, "chunk", chunk)
        self.index = index
        self.config = chunk.config
        self.vp_stage = chunk.vp_stage
        self.model_type = chunk.model_type
        self.share_embeddings_and_output_weights = chunk.share_embeddings_and_output_weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        runtime: Any = self.runtime
        # Without ZeRO, DeepSpeed has no hooks, and it refuses a backward pass that it doesn't run itself.
        call = runtime if runtime.zero_optimization() else runtime.module
        return call(self.index, *args, **kwargs)

    def set_input_tensor(self, tensor: Any) -> None:
        self.chunk.set_input_tensor(tensor)  # type: ignore[union-attr, operator]


def make_runtime(
    config: Config,
    chunks: Sequence[GPTModel],
    groups: ProcessGroupCollection,
    device: torch.device,
    shards: Mapping[int, Shard],
) -> tuple[GuardedEngine, list[ChunkCall]]:
    """DeepSpeed's engine, and one module a chunk for the schedule. `shards`: by id of the parameter. Collective.

    Afterwards the parameters are partitioned. At stage 3 they no longer have the shapes of the model.
    """
    start_deepspeed()
    GuardedEngine.has_experts = place_experts(chunks, groups)
    compare_orders_within(groups.dp_cp)
    answers = GroupAnswers(groups)
    settings = engine_settings(config, device.type == "cuda")
    if swaps(config):
        build_async_io()
        swap_small_groups()
        settings["zero_optimization"] |= swap_settings(fresh_folder(config), device.type == "cuda")
    runtime = GuardedEngine(
        args=None,
        model=Chunks(chunks),
        optimizer=make_adam(config, chunks, device, shards),
        mpu=answers,
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, answers),
    )
    if config.zero.stage == 3:
        gather_tied_embedding(chunks)
    return runtime, [ChunkCall(runtime, index, chunk) for index, chunk in enumerate(chunks)]


def engine_settings(config: Config, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's settings for our config. Its clipping is off, because its norms are wrong for this grid.

    pretrain/engine/deepspeed_gradients.py clips.
    """
    zero, precision = config.zero, config.precision
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_seqs,
        # The schedule accumulates gradients and calls step() once a batch. With a number above 1, DeepSpeed 0.19.8 would then
        # make no update, without an error. Unmanaged, each step() is an update.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": precision.grads,
        "data_types": {"grad_accum_dtype": precision.grads},
        "zero_optimization": {
            "stage": zero.stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": zero.overlap_grad_reduce,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
        },
    }
    if precision.params == "bf16":
        settings["bf16"] = {"enabled": True}
    place = {"device": "cpu", "pin_memory": cuda}
    if zero.offload != "none":
        settings["zero_optimization"]["offload_optimizer"] = place
    if zero.offload == "param":
        settings["zero_optimization"]["offload_param"] = place
    return settings


def make_adam(
    config: Config, chunks: Sequence[GPTModel], device: torch.device, shards: Mapping[int, Shard]
) -> torch.optim.Optimizer:
    """AdamW with separate groups for dense and expert parameters. Norms and biases have no decay, as in Megatron-Core.

    Parameters that Muon updates have groups of their own: DeepSpeed partitions them, and AdamW's steps pass over them.
    """
    optimizer = config.optimizer
    grouped: dict[tuple[bool, bool, bool, float], list[nn.Parameter]] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            is_vector = name.endswith(".bias") or parameter.dim() == 1
            is_expert = not getattr(parameter, "allreduce", True)
            shard = shards[id(parameter)]
            is_muons = updates_with_muon(shard.name, shard.global_shape, optimizer)
            factor = learning_rate_factor(shard.name, len(shard.global_shape), config.model)
            grouped.setdefault((is_expert, is_vector, is_muons, factor), []).append(parameter)
    members = [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_vector else optimizer.weight_decay / factor,
            "lr_mult": factor,
            "muon": is_muons,
            **({"moe": True, "name": EXPERT_GROUP} if is_expert else {}),
        }
        for (is_expert, is_vector, is_muons, factor), parameters in sorted(grouped.items(), key=lambda item: item[0])
    ]
    adam = _adam_of(config, members, device)
    if optimizer.kind == "muon":
        hide_in_step(adam, lambda group, _: group["muon"])
    return adam


def _adam_of(config: Config, members: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW on the device, or DeepSpeed's CPU Adam where offload and a compiler allow it."""
    optimizer = config.optimizer
    values: dict[str, Any] = dict(lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps)
    offloaded = config.zero.offload != "none"
    if offloaded and can_compile():
        # DeepSpeed's CPU Adam uses the host's vector instructions (ZeRO-Offload, arXiv 2101.06840).
        build_adam()
        return deepspeed.ops.adam.DeepSpeedCPUAdam(members, adamw_mode=True, **values)
    if offloaded and dist.get_rank() == 0:
        text = "no ninja or C++ compiler here: torch's AdamW updates the offloaded state, slower than DeepSpeed's CPU Adam"
        print(f"phalanx: {text}", file=sys.stderr, flush=True)
    fused = device.type == "cuda" and not offloaded
    return torch.optim.AdamW(members, fused=fused or None, **values)


def can_compile() -> bool:
    """Whether DeepSpeed can build its CPU Adam here. Otherwise torch's AdamW gives the same result, more slowly."""
    return bool(shutil.which("ninja")) and bool(shutil.which("c++") or shutil.which("g++"))
