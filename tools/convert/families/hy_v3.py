"""Hunyuan 3 (Tencent): grouped queries with q/k norms per head, sigmoid router, shared experts.

Source: transformers models/hy_v3.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.biases import BIASES, Biases
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.mlp_types import MlpLayerTypes
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

_M = "model.layers.{L}.mlp."

HY_V3 = Family(
    name="hy_v3",
    model_types=("hy_v3",),
    architecture="HYV3ForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(8)),
        settings.PLAIN_MLP,
        settings.HeadDim(absent=128),
        Rope(theta=11158840.0),
        Biases(),
        AllowedValues("mlp_bias", (False, None), "its experts have no biases, and megatron-core has one switch"),
        AllowedValues("qk_norm", (True,), "the family always has these norms"),
        *settings.plain_attention(*BIASES, **{"attention.qk_norm": True}),
        ConfigKey("num_experts", "moe.num_experts", 192, aliases=("num_local_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k", 8),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1536),
        ConfigKey("router_scaling_factor", "moe.router.scaling_factor", 2.826, float),
        settings.SharedExperts(absent=1, hf_key="num_shared_experts"),
        MlpLayerTypes(dense=1),
        *settings.sigmoid_router(),
        settings.FixedValue("moe.router.num_groups", None),
        AllowedValues("num_nextn_predict_layers", (0, None), "transformers has no code for its prediction depth"),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP, *tensors.experts(_M + "router.gate.weight"),
        *tensors.shared_experts("shared_mlp"), *tensors.expert_bias(_M + "expert_bias"),
    ),
    ignored=("enable_moe_fp32_combine", "enable_lm_head_fp32", "enable_attention_fp32_softmax"),
)  # fmt: skip
