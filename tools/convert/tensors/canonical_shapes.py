"""Canonical name and shape of every tensor of a model, from the `model` section alone.

In: Model, with its vocabulary size. Out: name -> shape, as checkpoints hold them. pretrain/model/shards.py gives the same
names from the built model; a test compares the two. Legend: h hidden, d head, f inner width, E experts.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.model_schema import Model
from parallel import architecture as arch

Shape = tuple[int, ...]


def tensor_shapes(model: Model) -> dict[str, Shape]:
    """Canonical name -> shape, in the order of the model."""
    assert model.vocab_size, "a converted model states its vocabulary"
    h = model.hidden_size
    table = (arch.padded_vocab(model, model.vocab_size), h)
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": table}
    if model.position.kind == "learned":
        assert model.max_position_tokens, "learned positions state how many there are"
        shapes["embedding.position_embeddings.weight"] = (model.max_position_tokens, h)
    for layer, kind in enumerate(arch.layer_kinds(model)):
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in layer_shapes(model, kind)}
    shapes |= dict(_norm(model, "decoder.final_layernorm", h))
    for depth in range(model.mtp.num_layers):
        head = f"mtp.layers.{depth}."
        for norm in ("enorm", "hnorm", "final_layernorm"):
            shapes |= dict(_norm(model, head + norm, h))
        shapes[f"{head}eh_proj.weight"] = (h, 2 * h)
        inner = layer_shapes(model, arch.mtp_kind(model))
        shapes |= {f"{head}transformer_layer.{name}": shape for name, shape in inner}
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = table
    return shapes


def layer_shapes(model: Model, kind: arch.LayerKind) -> Iterator[tuple[str, Shape]]:
    """(name without its prefix, shape) of each tensor of one transformer layer."""
    late = model.norm_position == "after"
    yield from _norm(model, "post_attention_layernorm" if late else "input_layernorm", model.hidden_size)
    if kind.delta:
        yield from _delta_net(model)
    else:
        yield from _latent(model) if arch.is_mla(model) else _attention(model)
    yield from _norm(model, "post_mlp_layernorm" if late else "pre_mlp_layernorm", model.hidden_size)
    yield from _moe(model) if kind.moe else _mlp(model, "mlp", arch.ffn(model), model.mlp_bias)


def _norm(model: Model, name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if model.norm == "layernorm":
        yield f"{name}.bias", (width,)


def _attention(model: Model) -> Iterator[tuple[str, Shape]]:
    h, d, attention = model.hidden_size, arch.head_dim(model), model.attention
    rows = arch.qkv_rows(model)
    yield "self_attention.linear_qkv.weight", (rows, h)
    if attention.qkv_bias:
        yield "self_attention.linear_qkv.bias", (rows,)
    if attention.qk_norm:
        whole = attention.qk_norm_span == "all_heads"
        yield from _norm(model, "self_attention.q_layernorm", attention.num_heads * d if whole else d)
        yield from _norm(model, "self_attention.k_layernorm", arch.num_query_groups(model) * d if whole else d)
    if attention.sinks:
        yield "self_attention.core_attention.softmax_offset", (attention.num_heads,)
    yield "self_attention.linear_proj.weight", (h, attention.num_heads * d)
    if attention.output_bias:
        yield "self_attention.linear_proj.bias", (h,)


def _delta_net(model: Model) -> Iterator[tuple[str, Shape]]:
    h, widths, heads = model.hidden_size, arch.delta_widths(model), model.delta_net.num_value_heads
    yield "self_attention.linear_in.weight", (widths.projected, h)
    yield "self_attention.conv1d.weight", (widths.mixed, 1, model.delta_net.conv_size_tokens)
    yield "self_attention.A_log", (heads,)
    yield "self_attention.dt_bias", (heads,)
    yield "self_attention.out_norm.weight", (model.delta_net.value_head_dim,)
    yield "self_attention.linear_proj.weight", (h, widths.value)


def _latent(model: Model) -> Iterator[tuple[str, Shape]]:
    h, mla, heads = model.hidden_size, model.mla, model.attention.num_heads
    assert mla.kv_lora_rank, "latent attention is on"
    query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank:
        yield "self_attention.linear_q_down_proj.weight", (mla.q_lora_rank, h)
        yield from _norm(model, "self_attention.q_layernorm", mla.q_lora_rank)
        yield "self_attention.linear_q_up_proj.weight", (query, mla.q_lora_rank)
    else:
        yield "self_attention.linear_q_proj.weight", (query, h)
    yield "self_attention.linear_kv_down_proj.weight", (mla.kv_lora_rank + mla.qk_rope_head_dim, h)
    yield from _norm(model, "self_attention.kv_layernorm", mla.kv_lora_rank)
    yield "self_attention.linear_kv_up_proj.weight", (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    if arch.is_sparse(model):
        yield from _indexer(model)
    yield "self_attention.linear_proj.weight", (h, heads * mla.v_head_dim)
    if model.attention.output_bias:
        yield "self_attention.linear_proj.bias", (h,)


def _indexer(model: Model) -> Iterator[tuple[str, Shape]]:
    """The indexer of sparse attention, which is counted and not built. Names as Megatron-Core's module has them."""
    dsa, name = model.dsa, "self_attention.core_attention.indexer"
    rank = model.mla.q_lora_rank or model.hidden_size
    yield f"{name}.linear_wq_b.weight", (dsa.num_index_heads * dsa.index_head_dim, rank)
    yield f"{name}.linear_wk.weight", (dsa.index_head_dim, model.hidden_size)
    yield f"{name}.k_norm.weight", (dsa.index_head_dim,)
    yield f"{name}.k_norm.bias", (dsa.index_head_dim,)
    yield f"{name}.linear_weights_proj.weight", (dsa.num_index_heads, model.hidden_size)


def _mlp(model: Model, prefix: str, width: int, bias: bool, experts: Shape = ()) -> Iterator[tuple[str, Shape]]:
    rows = (2 if arch.is_gated(model) else 1) * width
    yield f"{prefix}.linear_fc1.weight", (*experts, rows, model.hidden_size)
    if bias:
        yield f"{prefix}.linear_fc1.bias", (*experts, rows)
    yield f"{prefix}.linear_fc2.weight", (*experts, model.hidden_size, width)
    if bias:
        yield f"{prefix}.linear_fc2.bias", (*experts, model.hidden_size)


def _moe(model: Model) -> Iterator[tuple[str, Shape]]:
    moe = model.moe
    yield "mlp.router.weight", (moe.num_experts, model.hidden_size)
    if moe.router.bias:
        yield "mlp.router.bias", (moe.num_experts,)
    if moe.router.expert_bias:
        yield "mlp.router.expert_bias", (moe.num_experts,)
    yield from _mlp(model, "mlp.experts", arch.expert_ffn(model), model.mlp_bias, (moe.num_experts,))
    if moe.shared_ffn_hidden_size:
        yield from _mlp(model, "mlp.shared_experts", moe.shared_ffn_hidden_size, False)
        if moe.shared_gate:
            yield "mlp.shared_experts.gate_weight", (1, model.hidden_size)
