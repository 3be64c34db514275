"""Qwen2-MoE: biases on queries, keys and values, a gated shared expert. Source: transformers models/qwen2_moe.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import ConfigKey, Family
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.windows import Windows, unclear
from tools.convert.tensors import shared_rules as tensors

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architecture="Qwen2MoeForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(16)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        ConfigKey("qkv_bias", "attention.qkv_bias", True, bool),
        Windows(unclear),
        *settings.plain_attention("attention.qkv_bias", "attention.window_size_tokens"),
        ConfigKey("num_experts", "moe.num_experts", 60),
        ConfigKey("num_experts_per_tok", "moe.top_k", 4),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1408),
        ConfigKey("shared_expert_intermediate_size", "moe.shared_ffn_hidden_size", 5632),
        ConfigKey("norm_topk_prob", "moe.router.normalize_top_k", False, bool),
        settings.SparsePattern(),
        AuxLossCoefficient(absent=0.001),
        *settings.softmax_router(**{"moe.shared_gate": True}),
    ),
    tensors=(
        *tensors.EMBEDDING,
        *tensors.ATTENTION,
        *tensors.DENSE_MLP,
        *tensors.experts(),
        *tensors.shared_experts("shared_expert"),
        tensors.SHARED_GATE,
    ),
)
