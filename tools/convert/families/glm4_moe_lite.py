"""GLM-4.7-Flash: DeepSeek-V3's latent attention with GLM-4.5's MoE layers and MTP. Source: transformers models/glm4_moe_lite.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.latent_attention import latent_attention
from tools.convert.hf_config.mlp_types import MlpLayerTypes
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    model_types=("glm4_moe_lite",),
    architecture="Glm4MoeLiteForCausalLM",
    settings=(
        *settings.decoder(1e-5),
        settings.PLAIN_MLP,
        *latent_attention(q_lora_rank=768),
        Rope(fraction=1.0),
        AllowedValues("rope_interleave", (True,), "the tensors hold the rotated widths as neighbouring pairs"),
        ConfigKey("n_routed_experts", "moe.num_experts", 64, aliases=("num_local_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k", 4),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1536),
        ConfigKey("routed_scaling_factor", "moe.router.scaling_factor", 1.8, float),
        settings.SharedExperts(absent=1),
        MlpLayerTypes(dense=1),
        settings.ExpertGroups(absent=(1, 1)),
        *settings.sigmoid_router(),
        AllowedValues("topk_method", ("noaux_tc", None), "the family selects with a bias on sigmoid scores"),
        AllowedValues("scoring_func", ("sigmoid", None), "the family's scores are sigmoid"),
        AllowedValues("moe_layer_freq", (1, None), "mlp_layer_types says which layers have experts"),
        ConfigKey("num_nextn_predict_layers", "mtp.num_layers", 0),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.LATENT, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts(),
        *tensors.expert_bias(), *tensors.MTP,
    ),
    copies=tensors.mtp_copies,
    ignored=("pretraining_tp", "router_aux_loss_coef"),
)  # fmt: skip
