"""The largest attention logit of each head over a global batch. The numbers are the same under any layout.

In: the chunks of this rank. Out: maxima [attentions, heads] of the layers of this rank, all heads of the model.
Shapes: s local tokens, S = s x cp all tokens, b micro-batch, n heads of this rank, g key heads, d width of a head. A logit is
what enters the softmax, without the learned sinks of gpt-oss. It costs a second product of queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from configs.schema import Config
from pretrain.model.attention import Window, window_of, zigzag
from pretrain.model.shards import canonical_name, layer_of

# Queries whose logits are in memory at once.
_QUERIES = 256


def largest_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    positions: torch.Tensor,
    window: Window | None,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """The largest visible logit of each head: query [s, b, n, d], key [S, b, g, d] -> [n] fp32.

    `positions`: of the queries, [s]; keys are in natural order. `hidden`: bool [b, 1, s, S], True where a query must not look.
    """
    q, k = query.permute(1, 2, 0, 3), key.permute(1, 2, 3, 0)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    keys = torch.arange(k.shape[-1], device=q.device)[None, :]
    largest = q.new_full((q.shape[1],), float("-inf"), dtype=torch.float32)
    for start in range(0, q.shape[2], _QUERIES):
        at = positions[start : start + _QUERIES, None]
        unseen = at < keys
        if window is not None:
            unseen = unseen | ~window.sees(at, keys)
        if hidden is not None:
            unseen = unseen | hidden[:, :, start : start + _QUERIES]
        logits = (q[:, :, start : start + _QUERIES] @ k * scale).masked_fill_(unseen, float("-inf"))
        largest = torch.maximum(largest, logits.amax(dim=(0, 2, 3)).float())
    return largest


class AttentionLogits:
    """Watches the attentions of this rank while the model trains. All methods but `begin` are collective."""

    def __init__(self, config: Config, chunks: Sequence[GPTModel], groups: ProcessGroupCollection) -> None:
        self.groups, self.num_layers = groups, config.model.num_layers
        # Canonical prefix of each attention, and the layer of the decoder; None: multi-token prediction.
        self.names: list[str] = []
        self.layers: list[int | None] = []
        self.device = next(chunks[0].parameters()).device
        self.local_heads = config.model.attention.num_heads // groups.tp.size()
        for chunk in chunks:
            for local, module in chunk.named_modules():
                # A gated delta net stands under the same name and has no logits.
                if local.endswith("self_attention") and hasattr(module, "core_attention"):
                    parts = local.split(".")
                    layer = layer_of(chunk.decoder.layers[int(parts[2])]) if local.startswith("decoder.") else None
                    self._watch(len(self.names), module)
                    self.names.append(canonical_name(local, layer, 0)[0])
                    self.layers.append(layer)
        self.begin()
        # [attentions, heads] of the newest step, after `gather`.
        self.newest = self.maxima

    def begin(self) -> None:
        """Forget the maxima of the step before."""
        self.maxima = torch.full((len(self.names), self.local_heads), float("-inf"), device=self.device)

    def _watch(self, index: int, attention: Any) -> None:
        core = attention.core_attention
        window = window_of(core.config, attention.layer_number)
        scale = getattr(attention, "softmax_scale", None)

        @torch.no_grad()
        def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Recomputation runs the forward pass twice. The maxima don't change.
            if not module.training:
                return
            query, key = args[0].detach(), args[1].detach()
            mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
            positions, key = self._in_order(key)
            found = largest_logits(query, key, scale or query.shape[-1] ** -0.5, positions, window, mask)
            self.maxima[index] = torch.maximum(self.maxima[index], found)

        core.register_forward_pre_hook(watch, with_kwargs=True)

    def _in_order(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions of this rank's queries, keys of all context ranks in natural order)."""
        cp = self.groups.cp
        num_tokens = len(key) * cp.size()
        order = [zigzag(num_tokens, cp.size(), rank) for rank in range(cp.size())]
        if cp.size() == 1:
            return order[0].to(key.device), key
        parts = [torch.empty_like(key, memory_format=torch.contiguous_format) for _ in order]
        dist.all_gather(parts, key.contiguous(), group=cp)
        return order[cp.rank()].to(key.device), torch.cat(parts)[torch.argsort(torch.cat(order)).to(key.device)]

    def gather(self) -> None:
        """Reduce the maxima of this step over the global batch, and gather all heads."""
        largest = self.maxima
        self.newest = largest
        if not self.names:
            return
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.dp_cp)
        parts = [torch.empty_like(largest) for _ in range(self.groups.tp.size())]
        dist.all_gather(parts, largest, group=self.groups.tp)
        self.newest = torch.cat(parts, dim=1)

    def by_layer(self) -> tuple[list[float], float]:
        """The largest logits of the newest step: (of each layer of the model, of multi-token prediction), equal on all ranks.

        -inf: a layer without attention, or multi-token prediction is off.
        """
        rows = torch.full((self.num_layers + 1,), float("-inf"), device=self.device)
        for layer, largest in zip(self.layers, self.newest.amax(dim=1) if self.names else [], strict=True):
            index = self.num_layers if layer is None else layer
            rows[index] = torch.maximum(rows[index], largest)
        dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=self.groups.pp)
        *layers, prediction = rows.tolist()
        return layers, prediction


def make_attention_logits(config: Config, chunks: Sequence[GPTModel], groups: ProcessGroupCollection) -> AttentionLogits | None:
    """None where neither QK-clip nor the metrics need the logits."""
    wanted = config.metrics.attention_logits or config.optimizer.muon.qk_clip is not None
    return AttentionLogits(config, chunks, groups) if wanted else None
