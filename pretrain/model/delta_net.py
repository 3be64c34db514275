"""The gated delta net (Yang et al., arXiv 2412.06464), a layer with a recurrent state in the place of attention.

Megatron-Core's own module needs flash-linear-attention to be built at all, also in its versions with a path in torch, so no CPU
can run it. This one runs anywhere, on flash-linear-attention's kernel where the spec says so. Its input projection has the rows
of each key head together, so that a tensor rank's rows are consecutive.

Under context parallelism the recurrence needs whole sequences, and heads don't need one another: before it an all-to-all gives
each context rank all tokens of its part of the tensor rank's key heads, after it another one gives the tokens back. Weights of
the heads are whole on every context rank, which uses its part; gradients are summed over context ranks as all others are.

Shapes: s tokens of a whole sequence, b micro-batch, n value heads and g key heads of this rank, r = n / g, k and v the widths of
their heads, c tokens of a chunk.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all, copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.model.attention import zigzag

CHUNK_TOKENS = 64
# Added to the squared length of queries and keys, as in flash-linear-attention and transformers.
_LENGTH_EPS = 1e-6

DeltaRule = Callable[..., torch.Tensor]
"""(query [b, s, n, k], key [b, s, n, k], value [b, s, n, v], log_decay [b, s, n], beta [b, s, n]) -> [b, s, n, v]."""


def chunked_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The recurrence over a whole sequence from an empty state, in fp32. Shapes: `DeltaRule`.

    A token decays the state S [k, v], writes into it, and reads it: S <- a S + k (beta (v - a S^T k))^T, o = S^T q / sqrt(k).
    Queries and keys have length 1. Within a chunk the corrections of all tokens solve one triangular system (arXiv 2412.06464,
    section 3.3), so that only chunks follow one another.
    """
    dtype, length = value.dtype, value.shape[1]
    size = min(CHUNK_TOKENS, length)
    pad = -length % size

    def chunks(tensor: torch.Tensor) -> torch.Tensor:
        """[b, s, n, d] -> [b, n, s / c, c, d] in fp32. Tokens of the padding have beta 0 and write nothing."""
        return F.pad(tensor.float(), (0, 0, 0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, size))

    q, k, v = chunks(_unit(query) * query.shape[-1] ** -0.5), chunks(_unit(key)), chunks(value)
    b, decay = chunks(beta[..., None]), chunks(log_decay[..., None]).cumsum(3)
    earlier = torch.ones(size, size, dtype=torch.bool, device=value.device).tril(-1)
    # Masked before exp: above the diagonal it could overflow. The diagonal is a plain 1: as exp(x - x) its large gradients would
    # cancel, and their rounding would exceed the gradient of a strong decay.
    between = (decay - decay.transpose(-1, -2)).masked_fill(~earlier, float("-inf")).exp()
    between = between + torch.eye(size, device=value.device)
    system = b * (k @ k.transpose(-1, -2)) * between
    right = torch.cat([b * v, b * decay.exp() * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, forgotten = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.transpose(-1, -2)) * between
    last = decay[..., -1:, :]
    q, k_end = q * decay.exp(), k * (last - decay).exp()
    state = torch.zeros(*value.shape[:1], *value.shape[2:3], k.shape[-1], v.shape[-1], device=value.device)
    out = []
    for index in range(v.shape[2]):
        correction = written[:, :, index] - forgotten[:, :, index] @ state
        out.append(q[:, :, index] @ state + scores[:, :, index] @ correction)
        state = last[:, :, index].exp() * state + k_end[:, :, index].transpose(-1, -2) @ correction
    return torch.cat(out, dim=2)[:, :, :length].transpose(1, 2).to(dtype)


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1 along the last dim, in fp32."""
    tensor = tensor.float()
    return tensor * torch.rsqrt(tensor.square().sum(-1, keepdim=True) + _LENGTH_EPS)


def fused_delta_rule() -> DeltaRule:
    """The same recurrence by flash-linear-attention's kernel, which runs on GPUs only."""
    kernel: Any = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def rule(query: Any, key: Any, value: Any, log_decay: Any, beta: Any) -> torch.Tensor:
        return kernel(query, key, value, g=log_decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    return rule


class TokensForHeads:
    """The all-to-alls of context parallelism. Without it both ways return their input.

    A context rank has the tokens of `zigzag`, and is given those of all ranks in natural order.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.size = group, group.size()

    def _order(self, num_tokens: int) -> torch.Tensor:
        """The positions of all ranks' tokens, rank by rank."""
        return torch.cat([zigzag(num_tokens, self.size, rank) for rank in range(self.size)])

    def whole_sequence(self, tokens: torch.Tensor) -> torch.Tensor:
        """[s / cp, b, columns] -> [s, b, columns / cp]."""
        if self.size == 1:
            return tokens
        parts = torch.stack(tokens.chunk(self.size, dim=-1))
        received = all_to_all(self.group, parts).flatten(0, 1)
        return received[torch.argsort(self._order(len(received))).to(tokens.device)]

    def own_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """[s, b, columns / cp] -> [s / cp, b, columns]."""
        if self.size == 1:
            return tokens
        parts = torch.stack(tokens[self._order(len(tokens)).to(tokens.device)].chunk(self.size))
        return torch.cat(tuple(all_to_all(self.group, parts)), dim=-1)

    def own_heads(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of a weight of the tensor rank's heads that belongs to this context rank's."""
        return weight.chunk(self.size)[self.group.rank()]


class CausalConvolution(torch.nn.Module):
    """A convolution over the tokens of each column, each seeing itself and the tokens before it; then SiLU."""

    def __init__(self, columns: int, size_tokens: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = _split(torch.empty(columns, 1, size_tokens, dtype=config.params_dtype))

    def forward(self, tokens: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """[b, s, columns] -> [b, s, columns], of the columns to which `part` of the weight belongs."""
        padded, weight = F.pad(tokens.transpose(1, 2), (self.weight.shape[-1] - 1, 0)), part(self.weight)
        return F.silu(F.conv1d(padded, weight, groups=len(weight))).transpose(1, 2)


class GatedNorm(torch.nn.Module):
    """RMSNorm of each value head's output, times the SiLU of its gate. Its weight is never zero-centred.

    The tensor ranks have different heads and one weight: its gradient is summed in the backward pass.
    """

    def __init__(self, width: int, config: TransformerConfig, group: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, dtype=config.params_dtype))
        self.eps, self.group = config.layernorm_epsilon, group

    def forward(self, tokens: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """tokens, gate [b, s, n, v] -> [b, s, n, v]."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.group)
        normed = F.rms_norm(tokens.float(), (tokens.shape[-1],), eps=self.eps).to(tokens.dtype)
        return (weight * normed * F.silu(gate.float())).to(tokens.dtype)


def _split(tensor: torch.Tensor) -> torch.nn.Parameter:
    """A parameter whose first dim is split over the tensor ranks."""
    parameter: Any = torch.nn.Parameter(tensor)
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 1
    return parameter


@dataclass
class GatedDeltaNetSubmodules:
    """The modules of both projections: column-parallel and row-parallel."""

    linear_in: Any
    linear_proj: Any


class GatedDeltaNet(MegatronModule):
    """Replaces a layer's self-attention. Positions and masks are not used: the recurrence itself is causal."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: Any = None,
        fused: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.exchange = TokensForHeads(pg_collection.cp)
        group, keys, values = pg_collection.tp, config.linear_num_key_heads, config.linear_num_value_heads
        assert keys and values and config.linear_key_head_dim and config.linear_value_head_dim, "megatron_config sets them"
        self.key_dim, self.value_dim, self.ratio = config.linear_key_head_dim, config.linear_value_head_dim, values // keys
        # Columns of one key head: its query, its key, the values of its r value heads, their gates, and two numbers for each.
        self.parts = [2 * self.key_dim + self.ratio * self.value_dim, self.ratio * self.value_dim, self.ratio, self.ratio]
        projection: dict[str, Any] = dict(config=config, bias=False, is_expert=False, tp_group=group)
        self.linear_in: Any = build_module(
            submodules.linear_in, config.hidden_size, keys * sum(self.parts), init_method=config.init_method,
            gather_output=False, skip_bias_add=False, tp_comm_buffer_name="qkv", **projection,
        )  # fmt: skip
        local = values // group.size()
        self.conv1d = CausalConvolution(keys // group.size() * self.parts[0], config.linear_conv_kernel_dim or 0, config)
        self.A_log = _split(torch.empty(local, dtype=config.params_dtype))
        self.dt_bias = _split(torch.empty(local, dtype=config.params_dtype))
        self.out_norm = GatedNorm(self.value_dim, config, group)
        self.linear_proj: Any = build_module(
            submodules.linear_proj, values * self.value_dim, config.hidden_size, init_method=config.output_layer_init_method,
            input_is_parallel=True, skip_bias_add=True, tp_comm_buffer_name="proj", **projection,
        )  # fmt: skip
        self.rule = fused_delta_rule() if fused else chunked_delta_rule

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, h] -> ([s, b, h], None), of the context rank's tokens. With sequence parallelism, of the tensor rank's part of
        them.
        """
        assert attention_mask is None, "parallel.legality refuses document masks"
        own = self.exchange.own_heads
        projected = self.exchange.whole_sequence(self.linear_in(hidden_states)[0]).transpose(0, 1)
        mixed, gate, beta, step = projected.unflatten(-1, (-1, sum(self.parts))).split(self.parts, dim=-1)
        mixed = self.conv1d(mixed.flatten(2), own).unflatten(-1, (-1, self.parts[0]))
        query, key, value = mixed.split([self.key_dim, self.key_dim, self.parts[1]], dim=-1)
        value, gate = (self._by_head(tensor.flatten(2)) for tensor in (value, gate))
        query, key = (tensor.repeat_interleave(self.ratio, dim=2) for tensor in (query, key))
        # The decay in fp32: in bf16 exp(-exp(A) x) loses the difference between slow heads.
        log_decay = -own(self.A_log).float().exp() * F.softplus(step.flatten(2).float() + own(self.dt_bias).float())
        out = self.rule(query, key, value, log_decay, beta.flatten(2).sigmoid())
        out = self.exchange.own_tokens(self.out_norm(out, gate).flatten(2).transpose(0, 1).contiguous())
        return self.linear_proj(out)

    def _by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """[b, s, n v] -> [b, s, n, v]."""
        return tensor.unflatten(-1, (-1, self.value_dim))

    def backward_dw(self) -> None:
        """The delayed weight gradients of both projections."""
        self.linear_proj.backward_dw()
        self.linear_in.backward_dw()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty, because checkpoints are written by canonical name (pretrain/model/shards.py)."""
        return {}
