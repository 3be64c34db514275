"""The score of a group of experts as the sum of its best n, for group-limited routing. In: a router, n. Out: the router, changed.

DeepSeek-V2 (arXiv 2405.04434) takes a group's best expert, DeepSeek-V3 (arXiv 2412.19437) its best two. Megatron-Core adds up the
best top_k / group_top_k, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from parallel.compat.private_names import replaced, require_names

require_names(__name__)


def score_groups_by(router: TopKRouter, count: int) -> None:
    """Make `router` score each group by the sum of its best `count` experts."""
    router.routing = partial(_route, router.routing, count)  # type: ignore[method-assign]


def _route(routing: Callable[..., Any], count: int, *args: Any, **kwargs: Any) -> Any:
    with replaced(moe_utils, "group_limited_topk", partial(group_limited_topk, count)):
        return routing(*args, **kwargs)


def group_limited_topk(
    count: int, scores: torch.Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, indices) [tokens, topk] of the best experts of the `group_topk` best groups. scores: [tokens, experts]."""
    groups = scores.view(num_tokens, num_groups, num_experts // num_groups)
    best = groups.topk(count, dim=-1).values.sum(dim=-1).topk(group_topk, dim=-1).indices
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter(1, best.unsqueeze(-1).expand(-1, -1, groups.shape[-1]), True)
    return scores.masked_fill(~chosen.view_as(scores), float("-inf")).topk(topk, dim=-1)
