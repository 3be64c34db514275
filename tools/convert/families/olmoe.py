"""OLMoE (arXiv 2409.02060): q/k norms over all heads, softmax over all experts; FlexOlmo (arXiv 2507.07024) has OLMo-2's norms.

Source: transformers models/olmoe and flex_olmo.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, Setting
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors


def _experts(num_experts: int, top_k: int) -> tuple[Setting, ...]:
    """The settings of attention and experts. `num_experts`, `top_k`: values of absent keys."""
    return (
        settings.PLAIN_MLP,
        settings.HeadDim(),
        AllowedValues("attention_bias", (False, None), "its output bias has no counterpart here"),
        AllowedValues("clip_qkv", (None,), "clipped queries and keys can't be built"),
        *settings.plain_attention(**{"attention.qk_norm": True, "attention.qk_norm_span": "all_heads"}),
        ConfigKey("num_experts", "moe.num_experts", num_experts, aliases=("num_local_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k", top_k),
        ConfigKey("norm_topk_prob", "moe.router.normalize_top_k", False, bool),
        settings.AllSparse(),
        AuxLossCoefficient(absent=0.01),
        *settings.softmax_router(**{"moe.shared_ffn_hidden_size": None}),
    )


OLMOE = Family(
    name="olmoe",
    model_types=("olmoe",),
    architecture="OlmoeForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(None), ffn="moe.ffn_hidden_size"),
        Rope(),
        *_experts(64, 8),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.experts()),
)

FLEX_OLMO = Family(
    name="flex_olmo",
    model_types=("flex_olmo",),
    architecture="FlexOlmoForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(None), ffn="moe.ffn_hidden_size", norm_position="after"),
        Rope(theta=500000.0),
        *_experts(7, 5),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.attention(norms=tensors.POST_NORMS), *tensors.experts()),
)
