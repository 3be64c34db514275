"""Muon and QK-clip on the tensors of transformers, written from the papers, for the independent trainer.

Muon (K. Jordan 2024; Moonlight, arXiv 2502.16982, equations 1 to 4): the momentum is mu M + G, and with Nesterov's step
G + mu M is orthogonalised by Newton-Schulz. QK-clip (Kimi K2, arXiv 2507.20534, algorithm 1): a head whose largest logit S of the
step is above tau has gamma = tau / S. In the files of transformers queries, keys and values are tensors of their own.

Shapes: E experts, n heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tests.reference.model import Reference

# Jordan's triple of coefficients.
_A, _B, _C = 3.4445, -4.7750, 2.0315
# Takes a parameter, its gradient or its momentum; a view [rows, columns], rows are outputs.
Take = Callable[[torch.Tensor], torch.Tensor]


def is_muons(name: str, tensor: torch.Tensor, config: Any) -> bool:
    """Weights of products between the embedding and the output layer, those of routers where `router` says so."""
    if config.optimizer.kind != "muon" or tensor.dim() < 2 or "bias" in name or "embed_tokens" in name or "lm_head" in name:
        return False
    return config.optimizer.muon.router == "muon" or not name.endswith(("mlp.gate.weight", "mlp.router.weight"))


def orthogonal(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz on [rows, columns], as in Jordan's code, in float64."""
    x = matrix.double() / (matrix.double().norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x


class Muon:
    """The momentum of every parameter that Muon updates."""

    def __init__(self, model: Reference, config: Any) -> None:
        self.config, self.options = config, config.optimizer.muon
        named = dict(model.named_parameters())
        self.parameters = {name: tensor for name, tensor in named.items() if is_muons(name, tensor, config)}
        self.momentum = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        # Matrix -> its parts, one below the other.
        self.matrices: dict[tuple[object, ...], list[tuple[str, Take]]] = {}
        for name, tensor in self.parameters.items():
            for key, take in self._parts(name, tensor):
                self.matrices.setdefault(key, []).append((name, take))

    def _parts(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[tuple[object, ...], Take]]:
        prefix, leaf = name.removesuffix(".weight").rsplit(".", 1)
        if tensor.dim() == 3:
            yield from self._expert_parts(name, leaf, tensor)
        elif leaf in ("gate_proj", "up_proj"):
            yield ((name,) if self.options.split_gate else (prefix, "gate and up")), lambda whole: whole
        elif leaf in ("q_proj", "k_proj", "v_proj") and self.options.split_heads == "none" and not self._is_latent():
            yield (prefix, "queries, keys and values"), lambda whole: whole
        elif self.options.split_heads == "head" and (widths := self._head_widths(leaf)):
            starts = range(0, len(tensor), sum(widths))
            for start in starts:
                first, *rest = widths
                yield (name, start), lambda whole, at=start, size=first: whole[at : at + size]
                if rest:
                    yield (name, start, "values"), lambda whole, at=start + first, size=rest[0]: whole[at : at + size]
        else:
            yield (name,), lambda whole: whole

    def _expert_parts(self, name: str, leaf: str, tensor: torch.Tensor) -> Iterator[tuple[tuple[object, ...], Take]]:
        """gpt-oss stores a product's transpose, and gate and up projection in turns."""
        turned = self.config.model.activation == "gpt_oss_glu"
        for expert in range(len(tensor)):

            def matrix(whole: torch.Tensor, expert: int = expert) -> torch.Tensor:
                return whole[expert].T if turned else whole[expert]

            if leaf == "down_proj" or not self.options.split_gate:
                yield (name, expert), matrix
                continue
            half = tensor.shape[2 if turned else 1] // 2
            rows = [slice(0, None, 2), slice(1, None, 2)] if turned else [slice(0, half), slice(half, None)]
            for kind, part in enumerate(rows):
                yield (name, expert, kind), lambda whole, matrix=matrix, part=part: matrix(whole)[part]

    def _is_latent(self) -> bool:
        return self.config.model.mla.kv_lora_rank is not None

    def _head_widths(self, leaf: str) -> tuple[int, ...]:
        """Rows of one head, keys and values of latent attention apart. Empty: the tensor has no heads."""
        mla = self.config.model.mla
        if self._is_latent():
            queries = (mla.qk_nope_head_dim + mla.qk_rope_head_dim,)
            return {"q_proj": queries, "q_b_proj": queries, "kv_b_proj": (mla.qk_nope_head_dim, mla.v_head_dim)}.get(leaf, ())
        return (self.config.model.attention.head_dim,) if leaf in ("q_proj", "k_proj", "v_proj") else ()

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor], rate: float) -> None:
        """`gradients`: clipped, by name."""
        options = self.options
        rate = rate * options.lr_ratio
        directions = {}
        for name, momentum in self.momentum.items():
            momentum.mul_(options.momentum).add_(gradients[name])
            directions[name] = gradients[name] + options.momentum * momentum if options.nesterov else momentum
        for tensor in self.parameters.values():
            tensor.mul_(1 - rate * self.config.optimizer.weight_decay)
        for parts in self.matrices.values():
            whole = torch.cat([take(directions[name]) for name, take in parts])
            rows, columns = whole.shape
            scale = 0.2 * max(rows, columns) ** 0.5 if options.scale == "match_rms" else max(1.0, rows / columns) ** 0.5
            update = (rate * scale * orthogonal(whole, options.ns_steps)).float()
            for (name, take), part in zip(
                parts, update.split([len(take(directions[name])) for name, take in parts]), strict=True
            ):
                take(self.parameters[name]).sub_(part)


@torch.no_grad()
def qk_clip(model: Reference, config: Any) -> None:
    """Scale the heads by the maxima of the step. Grouped keys serve several heads and stay."""
    tau, alpha, mla = config.optimizer.muon.qk_clip, config.optimizer.muon.qk_clip_alpha, config.model.mla
    for attention in model.attentions():
        gamma = (tau / attention.largest_logits).clamp(max=1.0)[:, None]
        heads = len(gamma)
        if mla.kv_lora_rank is not None:
            queries = attention.q_b_proj if mla.q_lora_rank else attention.q_proj
            _scale(queries.weight, heads, (gamma**alpha, mla.qk_nope_head_dim), (gamma, mla.qk_rope_head_dim))
            _scale(attention.kv_b_proj.weight, heads, (gamma ** (1 - alpha), mla.qk_nope_head_dim))
            continue
        own_keys = (config.model.attention.num_query_groups or heads) == heads
        width = config.model.attention.head_dim
        for product, factor in (
            (attention.q_proj, gamma**alpha if own_keys else gamma),
            (attention.k_proj, gamma ** (1 - alpha)),
        ):
            if product is attention.q_proj or own_keys:
                for tensor in product.parameters():
                    _scale(tensor, heads, (factor, width))


def _scale(tensor: torch.Tensor, heads: int, *parts: tuple[torch.Tensor, int]) -> None:
    """The rows of each head: the first so many by a factor [n, 1], the next so many by another."""
    by_head, first = tensor.view(heads, len(tensor) // heads, -1), 0
    for factor, width in parts:
        by_head[:, first : first + width] *= factor[:, :, None]
        first += width
