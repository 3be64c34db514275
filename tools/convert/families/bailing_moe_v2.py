"""Ling 2.0 and Ring 2.0 (inclusionAI, arXiv 2510.22115): q/k norms per head, half-rotated heads, sigmoid router with groups.

Source: modeling_bailing_moe_v2.py beside the published weights; transformers has no code for it.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, RepeatedKey, tensor_rule
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors
from tools.convert.tensors.row_mappings import query_key_value_together, vocab

_L = "model.layers.{L}."
_A = _L + "attention."

BAILING_MOE_V2 = Family(
    name="bailing_moe_v2",
    model_types=("bailing_moe", "bailing_moe_v2"),
    architecture="BailingMoeV2ForCausalLM",
    settings=(
        AllowedValues("architectures", (["BailingMoeV2ForCausalLM"],), "the first Ling has another router and no norms"),
        *settings.decoder(1e-6, settings.KeyValueHeads(None)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(fraction=1.0),
        ConfigKey("use_qkv_bias", "attention.qkv_bias", False, bool),
        AllowedValues("use_bias", (False, None), "megatron-core has one switch for the biases of all linear layers"),
        AllowedValues("use_qk_norm", (True, None), "the published code always has these norms"),
        *settings.plain_attention("attention.qkv_bias", **{"attention.qk_norm": True}),
        ConfigKey("num_experts", "moe.num_experts", 256),
        ConfigKey("num_experts_per_tok", "moe.top_k", 8),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size"),
        ConfigKey("routed_scaling_factor", "moe.router.scaling_factor", 2.5, float),
        settings.SharedExperts(absent=1, hf_key="num_shared_experts"),
        RepeatedKey("moe_shared_expert_intermediate_size", "moe.shared_ffn_hidden_size"),
        settings.DenseFirst(absent=0),
        settings.ExpertGroups(absent=(8, 4)),
        *settings.sigmoid_router(),
        AllowedValues("score_function", ("sigmoid", None), "the published code's scores are sigmoid"),
        AllowedValues("moe_router_enable_expert_bias", (True, None), "the published code selects with a bias"),
        AllowedValues("num_nextn_predict_layers", (0, None), "no code for its prediction depth could be compared"),
    ),
    tensors=(
        tensor_rule("model", "embedding.word_embeddings.weight", "model.word_embeddings.weight", join=vocab),
        *tensors.EMBEDDING[1:],
        *tensors.NORMS,
        tensor_rule("layer", "self_attention.linear_qkv.weight", _A + "query_key_value.weight", join=query_key_value_together),
        tensor_rule(
            "layer", "self_attention.linear_qkv.bias", _A + "query_key_value.bias", join=query_key_value_together,
            when=lambda model: model.attention.qkv_bias,
        ),
        tensor_rule("layer", "self_attention.q_layernorm.weight", _A + "query_layernorm.weight"),
        tensor_rule("layer", "self_attention.k_layernorm.weight", _A + "key_layernorm.weight"),
        tensor_rule("layer", "self_attention.linear_proj.weight", _A + "dense.weight"),
        *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts(), *tensors.expert_bias(_L + "mlp.gate.expert_bias"),
    ),
    ignored=(
        "embedding_dropout", "output_dropout", "use_rmsnorm", "router_dtype", "mtp_loss_scaling_factor", "rotary_dim",
    ),
)  # fmt: skip
