"""Metrics of the routers: expert load and the values of auxiliary losses. The numbers are the same under any layout.

In: the chunks of this rank. Out: numbers by name, equal on all ranks. Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter

from configs.model_schema import Model
from parallel.architecture import moe_layers
from parallel.compat.expert_capacity import routed_before_dropping
from parallel.compat.megatron_private import take_router_losses
from parallel.compat.prediction_losses import take_prediction_losses
from pretrain.metrics.spread import spread
from pretrain.model.shards import layer_of


class MoeMetrics:
    """Collects the numbers of this rank's routers. `take` reduces them over all ranks and resets them.

    It costs one sum over [tokens, E] for each layer and micro-batch, and two all-reduces of about L x (E + 1) numbers a step.
    Megatron-Core's own reduction of auxiliary losses averages inside the collective, which gloo doesn't support.
    """

    def __init__(self, chunks: Sequence[GPTModel], model: Model, groups: ProcessGroupCollection) -> None:
        self.groups = groups
        self.moe_layers = [layer for layer, is_moe in enumerate(moe_layers(model)) if is_moe]
        self.mtp_depth = model.mtp.num_layers
        # A routed layer of multi-token prediction adds to the same trackers as the last layer.
        self.num_routers = len(self.moe_layers) + (self.mtp_depth if moe_layers(model)[-1] else 0)
        self.losses = _enabled_losses(model) if self.moe_layers else {}
        self.has_z_loss = bool(self.moe_layers) and model.moe.router.z_loss_coeff > 0
        device = next(chunks[0].parameters()).device
        # The first E columns count the tokens routed to each expert, before dropping. The last counts those not dropped.
        columns = max(model.moe.num_experts, 1) + 1
        self.counts = torch.zeros(model.num_layers, columns, dtype=torch.float64, device=device)
        # [MoE layers, E]: the loads of the newest step, summed over all ranks.
        self.step_loads = self.counts[self.moe_layers, :-1]
        self.experts_per_token = model.moe.top_k
        self.drops_tokens = bool(self.moe_layers) and model.moe.capacity_factor is not None
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                router = getattr(layer.mlp, "router", None)
                if isinstance(router, TopKRouter):
                    # First: DeepSpeed's hooks at stage 3 put copies in the place of what the router returned.
                    router.register_forward_hook(self._counter(layer_of(layer)), prepend=True)

    def _counter(self, layer: int) -> Any:
        def count(module: TopKRouter, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
            # Full recomputation runs the forward pass twice. The reported ratios don't change.
            if module.training:
                taken = output[1]
                routed = routed_before_dropping(taken)
                self.counts[layer, :-1] += routed.sum(dim=0)
                self.counts[layer, -1] += (routed & taken).sum()

        return count

    def take(self, num_micro_batches: int, shown_layers: int) -> dict[str, float]:
        """The numbers of one step by name, equal on all ranks. Collective.

        Auxiliary losses: means over layers and micro-batches, before their coefficients. `mtp_loss`: mean over depths and valid
        tokens, in nats. `expert_load_max_over_mean`: the largest load of an expert as a multiple of the mean load.
        `dead_experts`: the number of experts that no token chose. Loads are measured before dropping.
        `expert_drop_fraction`, with a capacity factor only: the dropped share of all (token, chosen expert) pairs.
        `shown_layers`: how many layers get a number of their own.
        """
        if not self.moe_layers and not self.mtp_depth:
            return {}
        groups = self.groups
        prediction = take_prediction_losses(max(self.mtp_depth, 1), self.counts.device)
        packed = torch.cat([self.counts.flatten(), self._tracked(num_micro_batches), prediction.flatten()])
        dist.all_reduce(packed, group=groups.tp_dp_cp)
        dist.all_reduce(packed, group=groups.pp)
        self.counts.zero_()
        result = {}
        counts, tracked, prediction = packed.split([self.counts.numel(), len(self.losses) + 1, prediction.numel()])
        for name, value in zip([*self.losses, "z_loss"], tracked.tolist(), strict=True):
            if name != "z_loss" or self.has_z_loss:
                result[name] = value
        if self.mtp_depth:
            totals = prediction.view(-1, 2)
            result["mtp_loss"] = float((totals[:, 0] / totals[:, 1].clamp(min=1)).mean())
        if self.moe_layers:
            counts = counts.view_as(self.counts)[self.moe_layers]
            self.step_loads = counts[:, :-1]
            result |= self._loads(counts, shown_layers)
        return result

    def expert_counts(self, tokens: int) -> list[list[int]]:
        """Tokens of each expert in the newest step: [MoE layers][E]. `tokens`: of the step's global batch.

        Several ranks of a tensor parallel group may count the same token, and full recomputation counts it twice. The known sum,
        tokens x experts a token, takes such multiples out.
        """
        multiple = self.step_loads.sum(dim=1, keepdim=True) / (tokens * self.experts_per_token)
        return (self.step_loads / multiple).round().long().tolist()

    def _tracked(self, num_micro_batches: int) -> torch.Tensor:
        """This rank's share of each loss: [number of losses + 1]. The sum over all ranks is the mean."""
        groups, tracked = self.groups, take_router_losses()
        routers = self.num_routers * num_micro_batches
        world = groups.tp_dp_cp.size()
        dp = groups.dp_cp.size() // groups.cp.size()

        def total(key: str) -> torch.Tensor:
            return tracked.get(key, self.counts.new_zeros(()))

        # Tensor and context ranks have partial sums, data ranks have values of which the mean is taken. The global loss is a
        # partial sum on all of them.
        values = [total(key) / (routers * (1 if name == "global_aux_loss" else dp)) for name, key in self.losses.items()]
        values.append(total("z_loss") / (routers * world) if routers else total("z_loss"))
        return torch.stack(values)

    def _loads(self, counts: torch.Tensor, shown_layers: int) -> dict[str, float]:
        """The load metrics. `counts`: [MoE layers, E + 1], summed over the global batch."""
        loads, taken = counts[:, :-1], counts[:, -1]
        ratio = loads.amax(dim=1) / loads.mean(dim=1).clamp(min=1e-9)
        result = {"expert_load_max_over_mean": float(ratio.max()), "dead_experts": float((loads == 0).sum())}
        if self.drops_tokens:
            result["expert_drop_fraction"] = float(1 - taken.sum() / loads.sum().clamp(min=1))
        for index in spread(len(self.moe_layers), shown_layers):
            result[f"expert_load_max_over_mean/layer_{self.moe_layers[index]}"] = float(ratio[index])
        return result


def _enabled_losses(model: Model) -> dict[str, str]:
    """The load-balancing loss that is on: our name -> the key of Megatron-Core's tracker."""
    router = model.moe.router
    keys = {
        "aux_loss": "load_balancing_loss",
        "seq_aux_loss": "seq_load_balancing_loss",
        "global_aux_loss": "global_load_balancing_loss",
    }
    return {router.balance: keys[router.balance]} if router.balance in keys and router.aux_loss_coeff > 0 else {}
