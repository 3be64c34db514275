"""What a `model` section means once its defaults are filled in, and the matrix products of each layer.

In: configs' Model. Out: plain numbers (widths in elements, per layer). Everything that needs an effective value (the
model builder, the split into stages, FLOPs, memory) asks here. Legend: h hidden, f inner width, E experts, k top_k.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from configs.model_schema import Model

GATED = ("swiglu", "geglu", "gpt_oss_glu")


def is_mla(model: Model) -> bool:
    """True with multi-head latent attention."""
    return model.mla.kv_lora_rank is not None


def is_sparse(model: Model) -> bool:
    """True with DeepSeek sparse attention: an indexer chooses the keys of each query."""
    return model.dsa.top_k is not None


def head_dim(model: Model) -> int:
    """Width of one ordinary attention head (query, key and value alike)."""
    return model.attention.head_dim or model.hidden_size // model.attention.num_heads


def query_dim(model: Model) -> int:
    """Width of one head's query and key as they are multiplied."""
    return model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim if is_mla(model) else head_dim(model)


def value_dim(model: Model) -> int:
    """Width of one head's value."""
    return model.mla.v_head_dim if is_mla(model) else head_dim(model)


def num_query_groups(model: Model) -> int:
    """Key/value heads; as many as query heads unless grouped."""
    return model.attention.num_query_groups or model.attention.num_heads


def state_elements(model: Model) -> int:
    """Numbers that a gated delta net carries from a sequence's token to the next: states, and last inputs of the convolution."""
    net = model.delta_net
    states = net.num_value_heads * net.key_head_dim * net.value_head_dim
    return states + (net.conv_size_tokens - 1) * delta_widths(model).mixed


def qkv_rows(model: Model) -> int:
    """Rows of ordinary attention's query-key-value weight, with its output gate."""
    queries = (2 if model.attention.output_gate else 1) * model.attention.num_heads
    return (queries + 2 * num_query_groups(model)) * head_dim(model)


def ffn(model: Model) -> int:
    """Inner width of a dense layer's MLP."""
    return model.ffn_hidden_size or 4 * model.hidden_size


def expert_ffn(model: Model) -> int:
    """Inner width of one routed expert."""
    return model.moe.ffn_hidden_size or ffn(model)


def is_gated(model: Model) -> bool:
    """True when the MLP's first product makes a gate beside the activation (twice the width)."""
    return model.activation in GATED


def moe_layers(model: Model) -> tuple[bool, ...]:
    """For each layer, whether it is a MoE layer. Layer indices count from 0, dense ones at the bottom included."""
    moe = model.moe
    if moe.num_experts == 0:
        return (False,) * model.num_layers
    if moe.layer_pattern is not None:
        return tuple(bool(flag) for flag in moe.layer_pattern)
    return tuple(i >= moe.first_dense_layers and i % moe.layer_frequency == 0 for i in range(model.num_layers))


def group_score_experts(model: Model) -> int:
    """Best experts of a group whose scores add up to the group's score, in group-limited routing."""
    router = model.moe.router
    return router.group_score_experts or model.moe.top_k // (router.group_top_k or 1)


class LayerKind(NamedTuple):
    """What a layer consists of. `delta`: a gated delta net in the place of attention. `moe`: experts in the place of an MLP."""

    moe: bool
    delta: bool = False


def has_delta_net(model: Model) -> bool:
    """True when some layer has a gated delta net in the place of attention."""
    return any(model.delta_net.pattern or ())


def delta_layers(model: Model) -> tuple[bool, ...]:
    """For each layer, whether it has a gated delta net in the place of attention."""
    pattern = model.delta_net.pattern or [0]
    return tuple(bool(pattern[layer % len(pattern)]) for layer in range(model.num_layers))


def layer_kinds(model: Model) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    return tuple(LayerKind(*kind) for kind in zip(moe_layers(model), delta_layers(model), strict=True))


def mtp_kind(model: Model) -> LayerKind:
    """A prediction depth has attention, and experts or an MLP as the last layer has (as Megatron-Core builds it)."""
    return LayerKind(moe_layers(model)[-1])


@dataclass(frozen=True)
class DeltaWidths:
    """Widths of all heads of a gated delta net together: `key` of queries and of keys, `value` of values and of their gate.

    `mixed`: columns of the convolution, queries, keys and values. `projected`: rows of the input projection, which are those
    columns, the gate, and two numbers for each value head.
    """

    key: int
    value: int
    mixed: int
    projected: int


def delta_widths(model: Model) -> DeltaWidths:
    """The widths of the model's gated delta nets."""
    net = model.delta_net
    key, value = net.num_key_heads * net.key_head_dim, net.num_value_heads * net.value_head_dim
    return DeltaWidths(key, value, 2 * key + value, 2 * key + 2 * value + 2 * net.num_value_heads)


def window_of_layer(model: Model, layer: int) -> int | None:
    """Sliding window of a layer in tokens, the query's own included; None: full attention."""
    attention = model.attention
    if attention.window_pattern is not None:
        has_window = bool(attention.window_pattern[layer])
    else:
        has_window = attention.window_layers == "all" or layer % 2 == 0
    return attention.window_size_tokens if has_window else None


def padded_vocab(model: Model, vocab_size: int) -> int:
    """Rows of the embedding and output tables: the vocabulary rounded up to model.vocab_multiple, whatever the layout."""
    return -(-vocab_size // model.vocab_multiple) * model.vocab_multiple


@dataclass(frozen=True)
class Products:
    """Weights of the matrix products a token passes in one layer, by component. `routed` counts k of E experts."""

    attention: int
    dense: int = 0
    routed: int = 0
    shared: int = 0
    router: int = 0
    indexer: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.dense + self.routed + self.shared + self.router + self.indexer


def attention_products(model: Model) -> int:
    """Weights of one layer's attention products, biases and norms not counted.

    Ordinary: h(heads·d) + 2h(groups·d) + (heads·d)h, with an output gate h(heads·d) more. MLA: the down and up projections of
    query and key/value, and output.
    """
    h, heads, mla = model.hidden_size, model.attention.num_heads, model.mla
    if mla.kv_lora_rank is None:
        return h * (qkv_rows(model) + heads * head_dim(model))
    query = heads * query_dim(model)
    down = h * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    q = h * mla.q_lora_rank + mla.q_lora_rank * query if mla.q_lora_rank else h * query
    return q + down + up + heads * mla.v_head_dim * h


def indexer_products(model: Model) -> int:
    """Weights of one layer's indexer: the queries of its heads, from the compressed query; one key; a weight for each head."""
    dsa = model.dsa
    if not is_sparse(model):
        return 0
    queries = (model.mla.q_lora_rank or model.hidden_size) * dsa.num_index_heads * dsa.index_head_dim
    return queries + model.hidden_size * (dsa.index_head_dim + dsa.num_index_heads)


def delta_products(model: Model) -> int:
    """Weights of one gated delta net's products, the convolution among them: each of its columns has one weight a token."""
    widths = delta_widths(model)
    return model.hidden_size * (widths.projected + widths.value) + model.delta_net.conv_size_tokens * widths.mixed


def mlp_products(model: Model, width: int) -> int:
    """Weights of an MLP of inner `width`: 3hf with a gate, else 2hf."""
    return (3 if is_gated(model) else 2) * model.hidden_size * width


def layer_products(model: Model, kind: LayerKind) -> Products:
    """The products a token passes in one layer of the given kind. `attention` holds those of a gated delta net, too."""
    attention = delta_products(model) if kind.delta else attention_products(model)
    indexer = 0 if kind.delta else indexer_products(model)
    if not kind.moe:
        return Products(attention, dense=mlp_products(model, ffn(model)), indexer=indexer)
    moe = model.moe
    shared = mlp_products(model, moe.shared_ffn_hidden_size) if moe.shared_ffn_hidden_size else 0
    gate = model.hidden_size if moe.shared_gate else 0
    routed = moe.top_k * mlp_products(model, expert_ffn(model))
    return Products(attention, routed=routed, shared=shared + gate, router=model.hidden_size * moe.num_experts, indexer=indexer)
