"""Qwen3-Next: gated delta nets between layers of gated attention, zero-centred norms, a gated shared expert.

Source: transformers models/qwen3_next.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, Setting, tensor_rule
from tools.convert.hf_config.hybrid import DELTA_NET, OneDepth
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors
from tools.convert.tensors.row_mappings import delta_grouped

_D = "model.layers.{L}.linear_attn."
# Both kinds of layers of Qwen3-Next and Qwen3.5.
HYBRID: tuple[Setting, ...] = (
    settings.PLAIN_MLP,
    settings.HeadDim(absent=256),
    Rope(fraction=0.25),
    AllowedValues("attention_bias", (False,), "megatron-core has one switch for the biases of all linear layers"),
    *DELTA_NET,
    *settings.plain_attention(
        "delta_net.pattern", "mtp.num_layers", **{"attention.qk_norm": True, "attention.output_gate": True}
    ),
)  # fmt: skip
DEPTH = "mtp.layers.0."
LEFT_OUT = (("mtp.", "the layer of multi-token prediction, which config.json doesn't name, or which has tables of its own"),)

QWEN3_NEXT = Family(
    name="qwen3_next",
    model_types=("qwen3_next",),
    architecture="Qwen3NextForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(2), norm="zero_centered_rmsnorm"),
        *HYBRID,
        OneDepth("num_nextn_predict_layers"),
        ConfigKey("num_experts", "moe.num_experts", 512),
        ConfigKey("num_experts_per_tok", "moe.top_k", 10),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 512),
        ConfigKey("shared_expert_intermediate_size", "moe.shared_ffn_hidden_size", 512),
        ConfigKey("norm_topk_prob", "moe.router.normalize_top_k", True, bool),
        settings.SparsePattern(),
        AuxLossCoefficient(absent=0.001),
        *settings.softmax_router(**{"moe.shared_gate": True}),
    ),
    tensors=(
        *tensors.EMBEDDING,
        *tensors.ATTENTION,
        *tensors.delta_net(
            tensor_rule(
                "delta",
                "self_attention.linear_in.weight",
                _D + "in_proj_qkvz.weight",
                _D + "in_proj_ba.weight",
                join=delta_grouped,
            )
        ),
        *tensors.DENSE_MLP,
        *tensors.experts(),
        *tensors.shared_experts("shared_expert"),
        tensors.SHARED_GATE,
        *tensors.QWEN_MTP,
    ),
    left_out=LEFT_OUT,
    depth_prefix=DEPTH,
)
