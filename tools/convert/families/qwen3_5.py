"""Qwen3.5's language models, dense and MoE: as Qwen3-Next, with a projection of its own for each input of a gated delta net.

Source: transformers models/qwen3_5 and models/qwen3_5_moe. The published folders are multimodal; text rotates by one position
in all three sections of their rotary positions, which is plain rotation.

Torch-free.
"""

from __future__ import annotations

from tools.convert.families.qwen3_next import DEPTH, HYBRID, LEFT_OUT
from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import ConfigKey, Family, FixedValue, tensor_rule
from tools.convert.hf_config.hybrid import OneDepth
from tools.convert.tensors import shared_rules as tensors
from tools.convert.tensors.row_mappings import delta_separate

_D = "model.layers.{L}.linear_attn."
_PROJECTION = tensor_rule(
    "delta",
    "self_attention.linear_in.weight",
    *(f"{_D}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")),
    join=delta_separate,
)
_TENSORS = (*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.delta_net(_PROJECTION), *tensors.QWEN_MTP)
_LEFT_OUT = (*LEFT_OUT, ("model.visual.", "the vision tower"))
_RENAMED = (("model.language_model.", "model."),)
_IGNORED = ("mamba_ssm_dtype", "attn_output_gate")

QWEN3_5 = Family(
    name="qwen3_5",
    model_types=("qwen3_5_text", "qwen3_5"),
    architecture="Qwen3_5ForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(4), norm="zero_centered_rmsnorm"),
        *HYBRID,
        OneDepth("mtp_num_hidden_layers"),
        settings.NoExperts(),
    ),
    tensors=(*_TENSORS, *tensors.DENSE_MLP),
    ignored=_IGNORED,
    left_out=_LEFT_OUT,
    depth_prefix=DEPTH,
    renamed=_RENAMED,
)

QWEN3_5_MOE = Family(
    name="qwen3_5_moe",
    model_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    architecture="Qwen3_5MoeForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(2), ffn=None, norm="zero_centered_rmsnorm"),
        *HYBRID,
        OneDepth("mtp_num_hidden_layers"),
        ConfigKey("num_experts", "moe.num_experts", 256),
        ConfigKey("num_experts_per_tok", "moe.top_k", 8),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 512),
        ConfigKey("shared_expert_intermediate_size", "moe.shared_ffn_hidden_size", 512),
        FixedValue("moe.router.normalize_top_k", True),
        settings.AllSparse(),
        AuxLossCoefficient(absent=0.001),
        *settings.softmax_router(**{"moe.shared_gate": True}),
    ),
    tensors=(*_TENSORS, *tensors.experts(), *tensors.shared_experts("shared_expert"), tensors.SHARED_GATE),
    ignored=_IGNORED,
    left_out=_LEFT_OUT,
    depth_prefix=DEPTH,
    renamed=_RENAMED,
)
