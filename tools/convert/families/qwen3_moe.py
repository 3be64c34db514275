"""Qwen3-MoE (arXiv 2505.09388): q/k norms per head, softmax over all experts. Source: transformers models/qwen3_moe.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.biases import BIASES, Biases
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.windows import Windows, every_layer
from tools.convert.tensors import shared_rules as tensors

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(4)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        Biases(),
        AllowedValues("use_qk_norm", (True,), "the family always has these norms"),
        Windows(every_layer, uniform=True),
        *settings.plain_attention(*BIASES, "attention.window_size_tokens", **{"attention.qk_norm": True}),
        ConfigKey("num_experts", "moe.num_experts", 128, also=("num_local_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k", 8),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 768),
        ConfigKey("norm_topk_prob", "moe.router.normalize_top_k", False, bool),
        settings.SparsePattern(),
        AuxLossCoefficient(absent=0.001),
        *settings.softmax_router(**{"moe.shared_ffn_hidden_size": None}),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP, *tensors.experts()),
)
