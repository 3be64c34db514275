"""GLM-4.5 to 4.7 (arXiv 2508.06471): grouped queries with biases, half-rotated heads, sigmoid router, MTP.

Source: transformers models/glm4_moe.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.family import ConfigKey, Family
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

GLM4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    architecture="Glm4MoeForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(8)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(fraction=0.5),
        ConfigKey("attention_bias", "attention.qkv_bias", False, bool),
        ConfigKey("use_qk_norm", "attention.qk_norm", False, bool),
        *settings.plain_attention("attention.qkv_bias", "attention.qk_norm", "mtp.num_layers"),
        ConfigKey("n_routed_experts", "moe.num_experts", 128, aliases=("num_local_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k", 8),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1408),
        ConfigKey("routed_scaling_factor", "moe.router.scaling_factor", 1.0, float),
        settings.SharedExperts(absent=1),
        settings.DenseFirst(absent=1),
        settings.ExpertGroups(absent=(1, 1)),
        *settings.sigmoid_router(),
        ConfigKey("num_nextn_predict_layers", "mtp.num_layers", 1, aliases=("num_mtp_layers",)),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts(),
        *tensors.expert_bias(), *tensors.MTP,
    ),
    copies=tensors.mtp_copies,
    ignored=("router_aux_loss_coef",),
)  # fmt: skip
