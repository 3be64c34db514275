"""The work on gradients after the data-parallel reduction, on the parts that ZeRO leaves on this rank.

In: slots and their reduced gradients. Out: gradients that are summed over tensor ranks and over copies of the embedding where
the layout needs it, their global norm, and clipped gradients. Megatron-Core's engine does the same. DeepSpeed 0.19.8's own norm
counts experts wrongly, and handles neither sequence parallelism nor copies on several stages.
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
    """The ids of parameters whose gradients the backward pass doesn't sum over tensor ranks.

    These are norms and biases that saw a part of the sequence, and query and key norms that saw a part of the heads. The
    condition is that of Megatron-Core's finalize_model_grads.
    """
    config = chunk.config
    return {
        id(parameter)
        for name, parameter in chunk.named_parameters()
        if (config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
    }


def sum_over_tensor_ranks(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sum the gradients in place, with one all-reduce. Tensor ranks have the same ranges of these parameters."""
    if group.size() == 1 or not gradients:
        return
    flat = torch.cat(list(gradients))
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([len(gradient) for gradient in gradients]), strict=True):
        gradient.copy_(summed)


class SharedEmbedding:
    """The word embedding where the first and the last stage both have it: it is tied, or multi-token prediction reads it.

    The ranges of ZeRO differ between the stages, so the whole gradient is assembled first. It takes one fp32 copy of the
    embedding on each of these ranks during the reduction.
    """

    def __init__(self, chunks: Sequence[GPTModel], groups: ProcessGroupCollection, sharded: bool, device: torch.device) -> None:
        """`device`: where gradients are while they are reduced. A rank without a part of the embedding needs it too."""
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
        """Sum the embedding's gradient over its copies, in place. Collective over the ranks that have the embedding."""
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
    """The L2 norm of all gradients of the model, with every element counted once.

    Returns a scalar tensor, equal on all ranks. Collective over the world.
    """
    squares = torch.zeros((), device=device)
    for slot, gradient in zip(slots, gradients, strict=True):
        shard = slot.shard
        if shard.tensor_replica == 0 and not shard.duplicate and (sharded or shard.data_rank == 0):
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float32).square().to(device)
    dist.all_reduce(squares)
    return squares.sqrt()


def clip(gradients: Sequence[torch.Tensor], max_norm: float, norm: float) -> None:
    """Multiply all gradients in place by max_norm / (norm + 1e-6) if that is below 1, as Megatron-Core does.

    `max_norm` 0: don't clip.
    """
    factor = max_norm / (norm + 1e-6)
    if max_norm > 0 and factor < 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
