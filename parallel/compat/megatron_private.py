"""Private parts of Megatron-Core that the engines, the metrics and the rehearsal read, behind functions of ours.

In: optimizers, chunks and routers of megatron-core. Out: plain tensors and numbers. Nothing here changes what the library
computes; a newer version that renames one of these parts is met in this module alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from parallel.compat.private_names import LibraryImports, require_names
from parallel.compat.versions import megatron_is_between

with LibraryImports(__name__):
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors

    # The module that keeps router losses: a dict in moe_utils before 0.18, an object since.
    _TRACKERS: Any = importlib.import_module(
        "megatron.core.transformer.moe." + ("moe_logging" if megatron_is_between("0.18") else "moe_utils")
    )
require_names(__name__)


# Optimizers.


def sharded_main(part: DistributedOptimizer, parameter: nn.Parameter) -> tuple[torch.Tensor, int, int] | None:
    """(main weights, start, stop) of the flat range of `parameter` that this rank updates; None: other ranks update all of it.

    The main weights are 1-D, fp32, of stop - start elements.
    """
    if parameter not in part.model_param_group_index_map:
        return None
    group, order = part.model_param_group_index_map[parameter]
    span = part._get_model_param_range_map(parameter)["param"]
    return part.optimizer.param_groups[group]["params"][order], span.start, span.end


def publish_main_weights(part: MegatronOptimizer) -> None:
    """Copy fp32 main weights into the weights that the model computes with, where an optimizer keeps both."""
    if hasattr(part, "_copy_main_params_to_model_params"):
        part._copy_main_params_to_model_params()  # pyright: ignore[reportAttributeAccessIssue]


# Routers.


def update_expert_bias(chunks: Sequence[nn.Module], config: TransformerConfig) -> None:
    """Move the bias of each expert by its load since the last call. Collective over tensor, context and data ranks."""
    if config.moe_router_enable_expert_bias:
        _update_router_expert_bias(list(chunks), config)


def clear_step_tensors(chunks: Sequence[nn.Module], config: TransformerConfig) -> None:
    """Forget what routers counted during one step: tokens of each expert."""
    reset_model_temporary_tensors(config, list(chunks))


def take_router_losses() -> dict[str, torch.Tensor]:
    """Sum over this rank's layers and micro-batches of each tracked router loss, by Megatron-Core's key; scalars.

    The trackers start anew.
    """
    if megatron_is_between("0.18"):
        tracker = _TRACKERS.get_moe_metrics_tracker()
        totals = {key: entry.values.sum().double() for key, entry in tracker.metrics.items()}
        tracker.clear()
        return totals
    entries = _TRACKERS.get_moe_layer_wise_logging_tracker()
    totals = {key: entry["values"].sum().double() for key, entry in entries.items()}
    _TRACKERS.clear_aux_losses_tracker()
    return totals


def watch_routing(router: TopKRouter, watcher: Callable[[torch.Tensor], None]) -> None:
    """Call `watcher` with the logits [..., experts] of every routing decision, before the decision."""
    routing = router.routing

    def watched(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        watcher(logits)
        return routing(logits, *args, **kwargs)

    router.routing = watched  # type: ignore[method-assign]
