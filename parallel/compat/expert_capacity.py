"""Expert capacity as GShard defines it, and what routers decided before it: megatron-core measures after dropping.

In: Megatron-Core's routers. Out: the same routers, whose maps of dropped tokens carry the map before dropping.
Shapes: T tokens of one rank's micro-batch, E experts.

Faults (megatron-core 0.16.1, all with `moe_expert_capacity_factor`):
1. `drop_policy=position` keeps the tokens that top-k over equal numbers happens to return. GShard (arXiv 2006.16668,
   algorithm 1) keeps the first ones by position.
2. The bias of experts moves by the load after dropping. Padded to capacity every expert has the same load, and the bias
   never moves.
3. The map that a router returns counts dropped tokens as not routed and padding as routed: load metrics read from it show
   balance where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from parallel.compat.private_names import LibraryImports, require_names

with LibraryImports(__name__):
    from megatron.core.transformer.moe import router as router_module
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, get_capacity
require_names(__name__)

_ROUTED = "phalanx_routed"


def routed_before_dropping(routing_map: torch.Tensor) -> torch.Tensor:
    """The experts that each token chose, bool [T, E], of a router's returned map [T, E]."""
    return getattr(routing_map, _ROUTED, routing_map)


def drop_tokens(
    routing_probs: torch.Tensor,
    routing_map: torch.Tensor,
    router_topk: int,
    capacity_factor: float,
    drop_policy: str = "probs",
    pad_to_capacity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for Megatron-Core's `apply_router_token_dropping`: (probs, map) [T, E] within capacity.

    The returned map carries `routing_map`, for `routed_before_dropping`.
    """
    num_tokens, num_experts = routing_map.shape
    capacity = get_capacity(num_tokens * router_topk, num_experts, capacity_factor)
    if drop_policy == "position" and capacity <= num_tokens:
        kept = first_by_position(routing_map, capacity)
        final_map = kept if pad_to_capacity else kept & routing_map
        final_probs = routing_probs * final_map
    else:
        final_probs, final_map = apply_router_token_dropping(
            routing_probs, routing_map, router_topk, capacity_factor, drop_policy, pad_to_capacity
        )
    setattr(final_map, _ROUTED, routing_map)
    return final_probs, final_map


def first_by_position(routing_map: torch.Tensor, capacity: int) -> torch.Tensor:
    """bool [T, E]: for each expert the first `capacity` tokens that chose it, then the first ones that did not."""
    num_tokens = len(routing_map)
    # All different: top-k has no ties to break.
    order = torch.arange(num_tokens, 0, -1, device=routing_map.device)[:, None] + num_tokens * routing_map.int()
    chosen = order.topk(capacity, dim=0, sorted=False).indices
    return torch.zeros_like(routing_map, dtype=torch.bool).scatter_(0, chosen, True)


def measure_before_dropping(chunks: Sequence[nn.Module]) -> None:
    """Let the bias of the experts in these chunks move by the load before dropping, in place."""
    router_module.apply_router_token_dropping = drop_tokens
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module._apply_expert_bias = partial(_count_routed, module)  # type: ignore[method-assign]


def _count_routed(router: TopKRouter, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
    TopKRouter._apply_expert_bias(router, routed_before_dropping(routing_map), padding_mask=padding_mask)
