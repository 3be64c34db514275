"""QK-clip: heads whose largest attention logit exceeds a threshold get smaller query and key weights (Kimi K2, arXiv 2507.20534).

In: the maxima of a step. Out: main weights, scaled in place after their update, so that the same batch would give at most tau:

    gamma = min(1, tau / S) for the largest logit S of a head over the global batch
    one key a head:   queries gamma^alpha, keys gamma^(1 - alpha)
    grouped keys:     queries gamma; keys belong to several heads and stay
    latent attention: the parts that are not rotated as with one key a head, rotated queries gamma; the rotated key, which all
                      heads share, stays

An output gate's rows lie among those of the queries and stay: a gate enters no logit. Gated delta nets have no logits.

Factors belong to canonical rows, so they are the same under every layout. A bias is scaled like its weight, before AdamW's update
of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from configs.schema import Config
from parallel import architecture as arch
from pretrain.engine.slots import Slot
from pretrain.model.attention_logits import AttentionLogits
from pretrain.model.tensor_slice import split_range

_PRODUCTS = ("linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")


class QkClip:
    """Scales the rows of the query and key products in an engine's slots."""

    def __init__(self, config: Config, slots: Sequence[Slot], logits: AttentionLogits) -> None:
        self.model, self.options, self.logits = config.model, config.optimizer.muon, logits
        attentions = {name: index for index, name in enumerate(logits.names)}
        self.slots: list[tuple[Slot, str, int]] = []
        for slot in slots:
            head, _, tail = slot.shard.name.partition("self_attention.")
            product = tail.split(".")[0]
            if product in _PRODUCTS:
                self.slots.append((slot, product, attentions[f"{head}self_attention"]))

    @torch.no_grad()
    def apply(self) -> None:
        """Clip by the newest maxima."""
        tau, largest = self.options.qk_clip, self.logits.newest
        assert tau is not None, "without a threshold nothing is clipped"
        gamma = torch.where(largest > tau, tau / largest, torch.ones_like(largest)).cpu()
        for slot, product, index in self.slots:
            if bool((gamma[index] < 1).any()):
                _scale_rows(slot, self._row_factors(product, gamma[index]).to(slot.main.device))

    def _row_factors(self, product: str, gamma: torch.Tensor) -> torch.Tensor:
        """The factor of each canonical row of a product. `gamma`: of each head."""
        model, alpha, one = self.model, self.options.qk_clip_alpha, torch.ones_like(gamma)
        if arch.is_mla(model):
            mla = model.mla
            if product == "linear_kv_up_proj":
                return _by_head((gamma ** (1 - alpha), mla.qk_nope_head_dim), (one, mla.v_head_dim))
            return _by_head((gamma**alpha, mla.qk_nope_head_dim), (gamma, mla.qk_rope_head_dim))
        groups, width = arch.num_query_groups(model), arch.head_dim(model)
        query, key = gamma.view(groups, -1), torch.ones(groups, 1)
        gate = torch.ones_like(query) if model.attention.output_gate else query[:, :0]
        if groups == len(gamma):
            query, key = query**alpha, query ** (1 - alpha)
        return torch.cat([query, gate, key, torch.ones(groups, 1)], dim=1).flatten().repeat_interleave(width)


def make_qk_clip(config: Config, slots: Sequence[Slot], logits: AttentionLogits | None) -> QkClip | None:
    """None: optimizer.muon.qk_clip is off."""
    return QkClip(config, slots, logits) if logits is not None and config.optimizer.muon.qk_clip is not None else None


def _by_head(*parts: tuple[torch.Tensor, int]) -> torch.Tensor:
    """Rows that lie head by head; of each head, parts of some width with one factor each."""
    return torch.cat([factor[:, None].expand(-1, width) for factor, width in parts], dim=1).flatten()


def _scale_rows(slot: Slot, factors: torch.Tensor) -> None:
    main = slot.main.detach().view(-1)
    for position, slice_, start, stop in slot.shard.slice_ranges(slot.start, slot.stop):
        for at, part in split_range(slice_, start, stop):
            first = position - slot.start + at - start
            rows = factors[part.offset[0] : part.offset[0] + part.shape[0]]
            main[first : first + part.size].view(part.shape[0], -1).mul_(rows[:, None])
