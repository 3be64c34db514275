"""Routers that Megatron-Core lacks. In: a chunk. Out: the same chunk, its routers changed in place.

Softmax scores with a selection bias (ERNIE 4.5). Megatron-Core adds the bias to sigmoid scores only. A softmax score p is the
sigmoid of log(p / (1 - p)), so the router gets that in place of its logits: selection, weights and balancing losses are then
those of p.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from configs.model_schema import Router
from parallel.compat.group_scores import score_groups_by


def adapt_routers(chunk: nn.Module, router: Router) -> None:
    """Make the routers of this chunk compute what `router` says."""
    for module in chunk.modules():
        if not isinstance(module, TopKRouter):
            continue
        if router.score == "softmax" and router.expert_bias:
            module.gating = partial(_sigmoid_logits, module.gating)  # type: ignore[method-assign]
        if router.num_groups and router.group_score_experts:
            score_groups_by(module, router.group_score_experts)


def _sigmoid_logits(gating: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """hidden [s, b, h] -> log(p / (1 - p)) of the softmax p over the experts [s, b, experts]."""
    logits = gating(hidden)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    # p = 1 would have an infinite logit. The bound is the largest float below 1.
    other = torch.log1p(-log_p.exp().clamp(max=1 - 2**-24))
    return (log_p - other).type_as(logits)
