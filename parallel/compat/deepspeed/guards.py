"""DeepSpeed's silent faults under a composed layout, and what keeps each of them away. Imports DeepSpeed: 3 s.

In: Megatron-Core chunks and their groups. Out: parameters that DeepSpeed partitions over the right ranks, and an engine
class that reduces every micro-batch under every schedule. Every guard names the fault that it keeps away; all of them
were met in deepspeed 0.19.8.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from parallel.compat.private_names import LibraryImports, replaced, require_names

with LibraryImports(__name__):
    from deepspeed.runtime import compiler
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter
    from deepspeed.utils import groups as deepspeed_groups
require_names(__name__)

EXPERT_GROUP = "experts"


def import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without compiling it.

    Fault: every engine looks whether its optimizer is DeepSpeed's Muon, whose import starts torch's compiler: 1.8 s of CPU
    a rank.
    """
    with replaced(compiler, "compile", lambda *args, **kwargs: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


import_muon()


def place_experts(chunks: Sequence[nn.Module], groups: ProcessGroupCollection) -> bool:
    """Tell DeepSpeed that expert parameters belong to the expert-data group; True when this rank has any.

    Fault: ZeRO-3 with experts that are not DeepSpeed's own partitions them over the whole data-parallel group, so that
    ranks with different experts share one weight: wrong from the first step, no error. ZeRO-2 raises a TypeError.
    """
    experts = [parameter for chunk in chunks for parameter in chunk.parameters() if not getattr(parameter, "allreduce", True)]
    for parameter in experts:
        parameter.group_name = EXPERT_GROUP  # type: ignore[attr-defined]
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = EXPERT_GROUP  # type: ignore[attr-defined]
        parameter.ds_zero_partition_process_group = groups.expt_dp  # type: ignore[attr-defined]
    deepspeed_groups._EXPERT_PARALLEL_GROUP[EXPERT_GROUP] = groups.ep
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[EXPERT_GROUP] = groups.expt_dp
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[EXPERT_GROUP] = dist.get_process_group_ranks(groups.ep)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[EXPERT_GROUP] = dist.get_process_group_ranks(groups.expt_dp)
    return bool(experts)


def compare_orders_within(group: dist.ProcessGroup) -> None:
    """Let stage 3 compare the order of its modules with the ranks that share its weights.

    Fault: it compares with rank 0 of the world, through broadcasts to all ranks. Pipeline stages have other modules, and run
    them at other times: the ranks wait for each other for ever.
    """

    def check(order: list[int]) -> None:
        orders: list[Any] = [None] * group.size()
        dist.all_gather_object(orders, order, group=group)
        if any(other != order for other in orders):
            raise RuntimeError(f"ZeRO-3 ranks run modules in different orders: {orders}")

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = check


def gather_tied_embedding(chunks: Sequence[GPTModel]) -> None:
    """Let stage 3 gather the word embedding for the output layer that computes with it, too.

    Fault: it gathers a weight for the module that owns it, and learns of others that use it as they run. With tied
    embeddings and multi-token prediction the output layer runs several times, and gets an empty weight: a RuntimeError.
    """
    for chunk in chunks:
        if chunk.post_process and chunk.share_embeddings_and_output_weights:
            weight = chunk.shared_embedding_or_output_weight()
            if weight is not chunk.output_layer.weight:
                register_external_parameter(chunk.output_layer, weight)


class GuardedEngine(DeepSpeedEngine):
    """DeepSpeed's engine for a foreign MoE model under a pipeline schedule.

    `before_update` is called when all gradients of a step are reduced; the update is made only when it returns True.
    """

    has_experts = False
    before_update: Callable[[], bool]

    # DeepSpeed sets it False before it has looked for its own MoE layers, and True when it finds some; ours it can't know.
    @property
    def has_moe_layers(self) -> bool:  # type: ignore[override]
        return self.has_experts

    @has_moe_layers.setter
    def has_moe_layers(self, value: bool) -> None: ...

    def _validate_zero3_moe_compatibility(self) -> None:
        """Stage 3 knows its own MoE layers only; `place_experts` did what it asks of them."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        """bf16 with fp32 gradients at stage 1 would get BF16_Optimizer: other state, another norm, no expert groups."""
        chosen = super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION if self.zero_optimization() else chosen

    def _backward_prologue(self) -> None:
        """Every backward pass starts afresh.

        Fault: what marks a backward pass as not yet reduced is reset by the next forward pass only. A pipeline schedule ends
        with several backward passes in a row; the gradients of all but the first stay unreduced (stage 2: wrong norm, then a
        crash) or overwrite the ones before (stage 3: wrong weights, no error).
        """
        if isinstance(self.optimizer, ZeROOptimizer):
            self.optimizer.clear_backward_seen_flag()
        super()._backward_prologue()

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self.before_update():
            super()._take_model_step(lr_kwargs)
