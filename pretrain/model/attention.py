"""Core attention for CPUs: torch's scaled_dot_product_attention behind Megatron-Core's interface.

Shapes: s local tokens, S = s x cp all tokens, b micro-batch, n heads of this rank, g key/value heads, d width of a query or key
head, v width of a value head. It covers GQA, MLA's unequal widths, sliding windows, chunks, learned sinks, document masks and
context parallelism. Under context parallelism each rank gathers the keys and values of all ranks and puts them from zigzag into
natural order. A rank then holds S keys and values, where Transformer Engine's ring holds s. The result is exact.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention


def zigzag(num_tokens: int, size: int, rank: int) -> torch.Tensor:
    """The positions of context rank `rank`: int64 [num_tokens / size].

    The sequence is cut into 2 x size chunks. A rank has chunks `rank` and 2 x size - 1 - `rank`, so that under a causal mask
    all ranks have the same work.
    """
    chunks = torch.arange(num_tokens).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]]) if size > 1 else torch.arange(num_tokens)


@dataclass(frozen=True)
class Window:
    """The keys that a layer's queries may look at, beside the causal mask. `chunked`: those of the query's chunk of `tokens`."""

    tokens: int
    chunked: bool

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Positions of queries and of keys, broadcast against each other -> bool."""
        return queries // self.tokens == keys // self.tokens if self.chunked else queries - keys < self.tokens


def window_of(config: TransformerConfig, layer_number: int) -> Window | None:
    """The window of a layer, counted from 1; None: full attention."""
    skip: Any = config.window_attn_skip_freq
    if not config.window_size or not is_layer_window_attention(config.window_size, skip, layer_number):
        return None
    return Window(config.window_size[0] + 1, getattr(config, "window_is_chunk", False))


class _GatherSequence(torch.autograd.Function):
    """[s, b, g, d] of every context rank -> [S, b, g, d] in rank order. The backward pass sums gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


class SDPAttention(MegatronModule):
    """Replaces DotProductAttention.

    Attention is causal, within the window if there is one. `attention_mask`: bool [b, 1, s, S], True where a query must
    not look in addition.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "groups are passed by hand"
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = window_of(config, layer_number)
        self.cp_group: dist.ProcessGroup = pg_collection.cp
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // pg_collection.tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            self.softmax_offset.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.softmax_offset.partition_dim = 0  # type: ignore[attr-defined]
            self.softmax_offset.partition_stride = 1  # type: ignore[attr-defined]
        else:
            self.softmax_offset = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query [s, b, n, d], key [s, b, g, d], value [s, b, g, v] -> [s, b, n x v]."""
        assert packed_seq_params is None and attention_bias is None, "documents travel as attention_mask on the CPU"
        if self.cp_group.size() > 1:
            key, value = self._gather(key), self._gather(value)
        visible = self._visible(query.shape[0], key.shape[0], attention_mask)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        scale = self.scale if self.scale is not None else q.shape[-1] ** -0.5
        if self.softmax_offset is not None:
            k, v, visible = self._with_sink(q, k, v, visible)
        with self._random_stream():
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale,
                dropout_p=self.dropout if self.training else 0.0, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _random_stream(self) -> AbstractContextManager[Any]:
        """The random stream of dropout. Tensor ranks have different heads and must draw different masks.

        Under sequence parallelism Megatron-Core's block has already entered the stream of this tensor rank.
        """
        if self.config.sequence_parallel or not self.training or self.dropout == 0.0:
            return nullcontext()
        streams: Any = get_cuda_rng_tracker()
        return streams.fork()

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        """[s, b, g, d] in zigzag order -> [S, b, g, d] in natural order."""
        size = self.cp_group.size()
        gathered = _GatherSequence.apply(local, self.cp_group)
        order = torch.cat([zigzag(len(gathered), size, rank) for rank in range(size)])
        return gathered[torch.argsort(order)]

    def _visible(self, num_queries: int, num_keys: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """True where a query may look: [s, S] or [b, 1, s, S]. None: plain causal attention, which SDPA does without a mask."""
        sinks = self.softmax_offset is not None
        if attention_mask is None and self.window is None and num_queries == num_keys and not sinks:
            return None
        queries = zigzag(num_keys, self.cp_group.size(), self.cp_group.rank())[:, None]
        keys = torch.arange(num_keys)[None, :]
        visible = queries >= keys
        if self.window is not None:
            visible = visible & self.window.sees(queries, keys)
        return visible if attention_mask is None else visible & ~attention_mask

    def _with_sink(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add one key to each head. Its score is the learned offset and its value is zero, so it adds to the denominator only.

        Returns (keys, values, additive mask [b, n, s, S + 1]).
        """
        assert visible is not None and self.softmax_offset is not None, "sinks come with an explicit mask"
        batch, heads, num_queries = q.shape[:3]
        hidden = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        hidden = hidden.expand(batch, heads, num_queries, k.shape[2])
        sink = self.softmax_offset.to(q.dtype).view(1, heads, 1, 1).expand(batch, heads, num_queries, 1)
        bias = torch.cat([hidden, sink], dim=-1)
        pad = (0, 0, 0, 1)
        return F.pad(k, pad), F.pad(v, pad), bias

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty, because checkpoints are written by canonical name (pretrain/model/shards.py)."""
        return {}
