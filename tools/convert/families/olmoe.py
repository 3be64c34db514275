"""OLMoE (arXiv 2409.02060): q/k norms over all heads, softmax over all experts. Source: transformers models/olmoe.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

OLMOE = Family(
    name="olmoe",
    model_types=("olmoe",),
    architecture="OlmoeForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(None), ffn="moe.ffn_hidden_size"),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        AllowedValues("attention_bias", (False, None), "its output bias has no counterpart here"),
        AllowedValues("clip_qkv", (None,), "clipped queries and keys can't be built"),
        *settings.plain_attention(**{"attention.qk_norm": True, "attention.qk_norm_span": "all_heads"}),
        ConfigKey("num_experts", "moe.num_experts", 64),
        ConfigKey("num_experts_per_tok", "moe.top_k", 8),
        ConfigKey("norm_topk_prob", "moe.router.normalize_top_k", False, bool),
        settings.AllSparse(),
        AuxLossCoefficient(absent=0.01),
        *settings.softmax_router(**{"moe.shared_ffn_hidden_size": None}),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.experts()),
)
