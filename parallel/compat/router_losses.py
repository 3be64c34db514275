"""The weight of a router's load balancing losses, where Megatron-Core's is wrong without an error.

In: the chunks of a rank. Out: routers that attach their losses with the right weight. The engine divides every gradient by
the number of tokens of the global batch, so a loss that is the mean of a micro-batch must enter times the tokens of that
micro-batch (pretrain/model/megatron_config.py, router_loss_weight, gives the share of tensor and context ranks).

Faults (megatron-core, with calculate_per_token_loss):
1. `seq_aux_loss`, up to 0.18: the router reshapes its scores from [sequence x batch, experts] to [sequence, batch x experts]
   and takes the first dim for the number of tokens. Symptom: the loss acts micro_batch_seqs times too weakly.
2. `global_aux_loss`, all versions: the loss is a sum over the data parallel ranks of partial means, each of which enters with
   the tokens of its own rank only. Symptom: the loss acts as many times too weakly as there are data parallel ranks.

Tests: tests/parallel/compat/test_router_losses.py (values made by hand), tests/reference (an independent trainer).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from parallel.compat.private_names import require_names
from parallel.compat.versions import megatron_is_between

require_names(__name__)

# The names that Megatron-Core logs the losses under.
_SEQUENCES, _GLOBAL_BATCH = "seq_load_balancing_loss", "global_load_balancing_loss"


def weigh_router_losses(chunks: Sequence[nn.Module]) -> None:
    """Give each router of these chunks the right weight for its balancing loss, in place, where this version's is wrong."""
    wrong = {_SEQUENCES, _GLOBAL_BATCH} if megatron_is_between("0.16.1", "0.18") else {_GLOBAL_BATCH}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                attach = module.attach_and_log_load_balancing_loss
                module.attach_and_log_load_balancing_loss = partial(_attach, module, attach, wrong)  # type: ignore[method-assign]


def _attach(
    router: TopKRouter,
    attach: Callable[..., torch.Tensor],
    wrong: Container[str],
    activation: torch.Tensor,
    aux_loss_coeff: float,
    aux_loss: torch.Tensor,
    aux_loss_name: str,
    reduce_group: dist.ProcessGroup,
    *options: Any,
    valid_token_count: Any = None,
    **named: Any,
) -> torch.Tensor:
    """activation [tokens of this rank, experts]; `reduce_group` holds the ranks whose shares sum to the loss.

    `wrong`: the losses that get another weight, by replacing `valid_token_count`. `options`, `named`: what the versions call
    reduce_group_has_dp or needs_dp_avg.
    """
    if aux_loss_name in wrong:
        data_ranks = reduce_group.size() // router.tp_cp_group.size()
        valid_token_count = activation.shape[0] * data_ranks
    named["valid_token_count"] = valid_token_count
    return attach(activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, *options, **named)
