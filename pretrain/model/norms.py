"""Norms that Megatron-Core lacks. Those of its layers come before attention and MLP; those of its queries and keys have a weight,
span one head and come before the rotation.

Shapes: s tokens, b micro-batch, n heads of this tensor rank, N heads of the model, d width of a head.

Over all heads together (OLMoE, arXiv 2409.02060; MiniMax-M2): each tensor rank has some heads only, so the sum of squares
travels. The weight is whole on every rank, and its gradient is summed over the tensor ranks like that of other norms of queries
and keys. After the rotation (Hunyuan): the norm is applied on the way into the core attention. Without a weight and in some
layers only (Llama 4): there, too, with the factor that grows with the position in the other layers.

After attention and MLP (OLMo-2, arXiv 2501.00656): the residual stream x goes x + norm(attention(x)), then x + norm(MLP(x)).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from pretrain.model.attention import zigzag


class _Sum(torch.autograd.Function):
    """The sum over the ranks of a group, forward and backward."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = local.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class AllHeadsNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) x weight, the mean over N x d. `num_heads`: N."""

    def __init__(self, config: TransformerConfig, num_heads: int, head_dim: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.group = num_heads, head_dim, group
        self.eps = config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.ones(num_heads * head_dim, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, n, d] -> [s, b, n, d]."""
        local, ranks = x.shape[-2], self.group.size()
        wide = x.float()
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        if ranks > 1:
            # With more ranks than keys' heads, several ranks have a copy of the same head.
            squares = _Sum.apply(squares, self.group) * (self.num_heads / (local * ranks))
        first = self.group.rank() * self.num_heads // ranks
        weight = self.weight.view(self.num_heads, self.head_dim)[first : first + local]
        return (wide * torch.rsqrt(squares / (self.num_heads * self.head_dim) + self.eps)).to(x.dtype) * weight


class AllHeadsAttention(SelfAttention):
    """Self-attention whose norms of queries and keys span all heads."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        width, group = self.hidden_size_per_attention_head, self.pg_collection.tp
        groups = config.num_query_groups or config.num_attention_heads
        self.q_layernorm = AllHeadsNorm(config, config.num_attention_heads, width, group)
        self.k_layernorm = AllHeadsNorm(config, groups, width, group)


class LateNorm(torch.nn.RMSNorm):
    """A norm of each head that is left out where Megatron-Core applies it, before the rotation."""

    def __init__(self, config: TransformerConfig, head_dim: int) -> None:
        super().__init__(head_dim, eps=config.layernorm_epsilon, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def late(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, n, d] -> [s, b, n, d]."""
        return super().forward(x)


class LateNormAttention(SelfAttention):
    """Self-attention whose norms of queries and keys follow the rotation."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.q_layernorm = LateNorm(config, self.hidden_size_per_attention_head)
        self.k_layernorm = LateNorm(config, self.hidden_size_per_attention_head)
        core: Any = self.core_attention
        core.register_forward_pre_hook(self._norm_rotated)

    def _norm_rotated(self, core: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, *rest = args
        return (self.q_layernorm.late(query), self.k_layernorm.late(key), *rest)


def root_mean_square_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps), the mean over the last dim, in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).type_as(x)


class Llama4Attention(SelfAttention):
    """Self-attention of Llama 4, by the TransformerConfig's `qk_l2_norm` and `temperature` (growth, step in tokens).

    Rotated layers divide queries and keys by their root mean square. In layers without positions the query at position p, from
    0, is multiplied by 1 + growth ln(1 + floor((p + 1) / step)) (scalable softmax, arXiv 2501.19399).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        unrotated: Any = config.no_rope_freq
        core: Any = self.core_attention
        core.register_forward_pre_hook(self._grow if unrotated and unrotated[self.layer_number - 1] else self._norm_rotated)

    def _norm_rotated(self, core: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, *rest = args
        if not self.config.qk_l2_norm:
            return args
        eps = self.config.layernorm_epsilon
        return (root_mean_square_norm(query, eps), root_mean_square_norm(key, eps), *rest)

    def _grow(self, core: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The query comes as [s, b, n, d], the positions of this context rank."""
        query, *rest = args
        if self.config.temperature is None:  # type: ignore[attr-defined]
            return args
        growth, step = self.config.temperature  # type: ignore[attr-defined]
        cp = self.pg_collection.cp
        positions = zigzag(len(query) * cp.size(), cp.size(), cp.rank()).to(query.device)
        factors = 1.0 + growth * torch.log1p(torch.floor((positions + 1.0) / step))
        return ((query * factors[:, None, None, None]).type_as(query), *rest)


class PostNormLayer(TransformerLayer):
    """A layer whose norms follow attention and MLP. `norm`: makes a norm, as a spec of Megatron-Core does."""

    def __init__(self, config: TransformerConfig, *args: Any, norm: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        eps = config.layernorm_epsilon
        self.post_attention_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=eps)
        self.post_mlp_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=eps)
        attention: Any = self.self_attention
        mlp: Any = self.mlp
        # A hook also runs where Megatron-Core calls the MLP again to recompute it.
        attention.register_forward_hook(lambda _, __, output: _normed(self.post_attention_layernorm, output))
        mlp.register_forward_hook(lambda _, __, output: _normed(self.post_mlp_layernorm, output))


def _normed(norm: torch.nn.Module, output: Any) -> tuple[torch.Tensor, None]:
    """(output [s, b, h], bias [h] or None) -> (norm of their sum, None)."""
    values, bias = output
    return norm(values if bias is None else values + bias), None
