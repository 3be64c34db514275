"""Tensor rules that several families share. Names are those of save_pretrained; `{L}` is the layer, `{E}` the expert.

Torch-free.
"""

from __future__ import annotations

from configs.model_schema import Model
from tools.convert.hf_config.family import TensorRule, tensor_rule
from tools.convert.tensors.row_mappings import FusionRule, delta_columns, gate_up, query_key_value, same, stacked, vocab

EMBEDDING = (
    tensor_rule("model", "embedding.word_embeddings.weight", "model.embed_tokens.weight", join=vocab),
    tensor_rule("model", "output_layer.weight", "lm_head.weight", join=vocab, when=lambda model: not model.tie_embeddings),
    tensor_rule("model", "decoder.final_layernorm.weight", "model.norm.weight"),
)
_L = "model.layers.{L}."
NORMS = (
    tensor_rule("layer", "input_layernorm.weight", _L + "input_layernorm.weight"),
    tensor_rule("layer", "pre_mlp_layernorm.weight", _L + "post_attention_layernorm.weight"),
)
POST_NORMS = (
    tensor_rule("layer", "post_attention_layernorm.weight", _L + "post_attention_layernorm.weight"),
    tensor_rule("layer", "post_mlp_layernorm.weight", _L + "post_feedforward_layernorm.weight"),
)
_A = _L + "self_attn."


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_A}{part}_proj.{kind}" for part in "qkv")


def attention(
    query_norm: str = _A + "q_norm.weight", key_norm: str = _A + "k_norm.weight", norms: tuple[TensorRule, ...] = NORMS
) -> tuple[TensorRule, ...]:
    """Grouped queries from one tensor each of queries, keys and values, with the norms around them and the layer's `norms`."""
    return (
        *norms,
        tensor_rule("attention", "self_attention.linear_qkv.weight", *_qkv("weight"), join=query_key_value),
        tensor_rule(
            "attention",
            "self_attention.linear_qkv.bias",
            *_qkv("bias"),
            join=query_key_value,
            when=lambda m: m.attention.qkv_bias,
        ),
        tensor_rule("attention", "self_attention.q_layernorm.weight", query_norm, when=lambda m: m.attention.qk_norm),
        tensor_rule("attention", "self_attention.k_layernorm.weight", key_norm, when=lambda m: m.attention.qk_norm),
        tensor_rule("attention", "self_attention.linear_proj.weight", _A + "o_proj.weight"),
        tensor_rule("attention", "self_attention.linear_proj.bias", _A + "o_proj.bias", when=lambda m: m.attention.output_bias),
        tensor_rule("attention", "self_attention.core_attention.softmax_offset", _A + "sinks", when=lambda m: m.attention.sinks),
    )


ATTENTION = attention()
_D = _L + "linear_attn."


def delta_net(projection: TensorRule) -> tuple[TensorRule, ...]:
    """The tensors of a gated delta net. `projection`: the rule of its input projection."""
    return (
        projection,
        tensor_rule("delta", "self_attention.conv1d.weight", _D + "conv1d.weight", join=delta_columns),
        tensor_rule("delta", "self_attention.A_log", _D + "A_log"),
        tensor_rule("delta", "self_attention.dt_bias", _D + "dt_bias"),
        tensor_rule("delta", "self_attention.out_norm.weight", _D + "norm.weight"),
        tensor_rule("delta", "self_attention.linear_proj.weight", _D + "out_proj.weight"),
    )


def _compressed(model: Model) -> bool:
    return model.mla.q_lora_rank is not None


LATENT = (
    *NORMS,
    tensor_rule("attention", "self_attention.linear_q_proj.weight", _A + "q_proj.weight", when=lambda m: not _compressed(m)),
    tensor_rule("attention", "self_attention.linear_q_down_proj.weight", _A + "q_a_proj.weight", when=_compressed),
    tensor_rule("attention", "self_attention.q_layernorm.weight", _A + "q_a_layernorm.weight", when=_compressed),
    tensor_rule("attention", "self_attention.linear_q_up_proj.weight", _A + "q_b_proj.weight", when=_compressed),
    tensor_rule("attention", "self_attention.linear_kv_down_proj.weight", _A + "kv_a_proj_with_mqa.weight"),
    tensor_rule("attention", "self_attention.kv_layernorm.weight", _A + "kv_a_layernorm.weight"),
    tensor_rule("attention", "self_attention.linear_kv_up_proj.weight", _A + "kv_b_proj.weight"),
    tensor_rule("attention", "self_attention.linear_proj.weight", _A + "o_proj.weight"),
)
_M = _L + "mlp."


def dense_mlp(head: str = _M) -> tuple[TensorRule, ...]:
    """A gated MLP. `head`: the start of its tensors' names."""
    gate, up, down = (f"{head}{part}_proj." for part in ("gate", "up", "down"))
    return (
        tensor_rule("dense", "mlp.linear_fc1.weight", gate + "weight", up + "weight", join=gate_up),
        tensor_rule("dense", "mlp.linear_fc1.bias", gate + "bias", up + "bias", join=gate_up, when=lambda m: m.mlp_bias),
        tensor_rule("dense", "mlp.linear_fc2.weight", down + "weight"),
        tensor_rule("dense", "mlp.linear_fc2.bias", down + "bias", when=lambda m: m.mlp_bias),
    )


DENSE_MLP = dense_mlp()


def experts(
    router: str = _M + "gate.weight", one: str = _M + "experts.{E}.", names: tuple[str, str, str] | None = None
) -> tuple[TensorRule, ...]:
    """Router and experts, one tensor per expert. transformers 5's stacked form (gate above up) is read, too."""
    gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
    together = _M + "experts."
    return (
        tensor_rule("moe", "mlp.router.weight", router, also=(((_M + "gate.weight",), same), ((_M + "router.weight",), same))),
        tensor_rule(
            "expert", "mlp.experts.linear_fc1.weight", f"{one}{gate}.weight", f"{one}{up}.weight", join=gate_up,
            also=(((together + "gate_up_proj",), stacked),),
        ),
        tensor_rule(
            "expert", "mlp.experts.linear_fc2.weight", f"{one}{down}.weight", also=(((together + "down_proj",), stacked),)
        ),
    )  # fmt: skip


def shared_experts(name: str = "shared_experts", block: str = _M) -> tuple[TensorRule, ...]:
    """The shared experts as one MLP. `block`: the start of the names of a layer's experts."""
    head, has = f"{block}{name}.", lambda model: bool(model.moe.shared_ffn_hidden_size)
    return (
        tensor_rule(
            "moe", "mlp.shared_experts.linear_fc1.weight", head + "gate_proj.weight", head + "up_proj.weight",
            join=gate_up, when=has,
        ),
        tensor_rule("moe", "mlp.shared_experts.linear_fc2.weight", head + "down_proj.weight", when=has),
    )  # fmt: skip


SHARED_GATE = tensor_rule("moe", "mlp.shared_experts.gate_weight", _M + "shared_expert_gate.weight")


def expert_bias(name: str = _M + "gate.e_score_correction_bias", join: FusionRule = same) -> tuple[TensorRule, ...]:
    """The selection bias of the router."""
    return (tensor_rule("moe", "mlp.router.expert_bias", name, join=join, when=lambda model: model.moe.router.expert_bias),)


# MTP layers follow the last layer in the numbering. Their embedding and head are copies of the model's.
MTP = (
    tensor_rule("mtp", "enorm.weight", _L + "enorm.weight"),
    tensor_rule("mtp", "hnorm.weight", _L + "hnorm.weight"),
    tensor_rule("mtp", "eh_proj.weight", _L + "eh_proj.weight"),
    tensor_rule("mtp", "final_layernorm.weight", _L + "shared_head.norm.weight"),
)


# Qwen's one prediction depth has names of its own, and takes the model's embedding and head.
QWEN_MTP = (
    tensor_rule("mtp", "enorm.weight", "mtp.pre_fc_norm_embedding.weight"),
    tensor_rule("mtp", "hnorm.weight", "mtp.pre_fc_norm_hidden.weight"),
    tensor_rule("mtp", "eh_proj.weight", "mtp.fc.weight"),
    tensor_rule("mtp", "final_layernorm.weight", "mtp.norm.weight"),
)


def mtp_copies(model: Model) -> dict[str, str]:
    """The tables that each MTP layer's files repeat: name -> name of the original."""
    copies = {}
    for layer in range(model.num_layers, model.num_layers + model.mtp.num_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies
