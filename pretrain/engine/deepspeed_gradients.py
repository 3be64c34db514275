"""What Megatron-Core does to gradients after the data-parallel reduction, done to the parts that ZeRO left on this rank.

In: slots and their reduced gradients. Out: the same, summed over tensor ranks and over copies of the embedding where the
layout needs it; the true global norm; clipped gradients. DeepSpeed 0.19.8's own norm counts experts wrongly and knows
neither sequence parallelism nor copies over stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from pretrain.engine.deepspeed_slots import ZeroSlot


def tensor_partial(chunk: GPTModel) -> set[int]:
    """ids of parameters whose gradient is a sum over tensor ranks that the backward pass leaves out.

    Norms and biases that saw a part of the sequence, and the q/k norms that saw a part of the heads: the same condition as
    in Megatron-Core's finalize_model_grads.
    """
    config = chunk.config
    return {
        id(parameter)
        for name, parameter in chunk.named_parameters()
        if (config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
    }


def sum_over_tensor_ranks(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """One all-reduce for all of them, in place. Tensor ranks hold the same ranges of these parameters: equal shapes."""
    if group.size() == 1 or not gradients:
        return
    flat = torch.cat(list(gradients))
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([len(gradient) for gradient in gradients]), strict=True):
        gradient.copy_(summed)


class SharedEmbedding:
    """The word embedding that the first and the last stage (tied, or read by multi-token prediction) both hold.

    Its ranges differ from stage to stage, so the whole gradient is put together first: one fp32 copy of the embedding on
    each of these ranks for the length of the reduction.
    """

    def __init__(self, chunks: Sequence[GPTModel], groups: ProcessGroupCollection, sharded: bool, device: torch.device) -> None:
        """`device` is where gradients are when they are reduced, also on a rank that has no part of this one."""
        self.parameter: nn.Parameter | None = None
        self.groups, self.sharded, self.device = groups, sharded, device
        ranks = dist.get_process_group_ranks(groups.embd) if groups.embd is not None else []
        if len(ranks) < 2 or dist.get_rank() not in ranks:
            return
        chunk = chunks[0] if chunks[0].pre_process else chunks[-1]
        if chunk.share_embeddings_and_output_weights or chunk.config.mtp_num_layers:
            weight = chunk.shared_embedding_or_output_weight()
            assert isinstance(weight, nn.Parameter), "a stage of the embedding group holds the embedding"
            self.parameter, self.numel = weight, weight.numel()

    def reduce(self, slots: Sequence[ZeroSlot], gradients: Sequence[torch.Tensor]) -> None:
        """In place. Collective over the ranks that hold the embedding."""
        if self.parameter is None:
            return
        mine = [pair for pair in zip(slots, gradients, strict=True) if pair[0].parameter is self.parameter]
        whole = torch.zeros(self.numel, device=self.device)
        for slot, gradient in mine:
            whole[slot.start : slot.stop] = gradient
        if self.sharded:
            dist.all_reduce(whole, group=self.groups.dp_cp)
        dist.all_reduce(whole, group=self.groups.embd)
        for slot, gradient in mine:
            gradient.copy_(whole[slot.start : slot.stop])


def global_norm(
    slots: Sequence[ZeroSlot], gradients: Sequence[torch.Tensor], sharded: bool, device: torch.device
) -> torch.Tensor:
    """L2 norm over all gradients of the model, every element counted once. Scalar, equal on all ranks. Collective."""
    squares = torch.zeros((), device=device)
    for slot, gradient in zip(slots, gradients, strict=True):
        shard = slot.shard
        if shard.tensor_replica == 0 and not shard.duplicate and (sharded or shard.data_rank == 0):
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float32).square().to(device)
    dist.all_reduce(squares)
    return squares.sqrt()


def clip(gradients: Sequence[torch.Tensor], max_norm: float, norm: float) -> None:
    """Scale all gradients by max_norm / norm where that is below 1, as Megatron-Core does; 0: not clipped."""
    factor = max_norm / (norm + 1e-6)
    if max_norm > 0 and factor < 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
