"""DeepSeek-V3 and R1 (arXiv 2412.19437), Kimi-K2: latent attention, sigmoid scores with a selection bias, MTP.

Source: transformers models/deepseek_v3 and the files' own modeling_deepseek.py. fp8 files are dequantised when read.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import DeepSeekBalance
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.latent_attention import latent_attention
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

# Also of the families that added sparse attention.
EXPERTS = (
    ConfigKey("n_routed_experts", "moe.num_experts", 256, aliases=("num_local_experts",)),
    ConfigKey("num_experts_per_tok", "moe.top_k", 8),
    ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 2048),
    ConfigKey("routed_scaling_factor", "moe.router.scaling_factor", 2.5, float),
)
SCORES = (
    *settings.sigmoid_router(),
    AllowedValues("topk_method", ("noaux_tc", None), "the family selects with a bias on sigmoid scores"),
    AllowedValues("scoring_func", ("sigmoid", None), "the family's scores are sigmoid"),
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "kimi_k2"),
    architecture="DeepseekV3ForCausalLM",
    settings=(
        *settings.decoder(1e-6),
        settings.PLAIN_MLP,
        *latent_attention(),
        Rope(),
        AllowedValues("rope_interleave", (True,), "the tensors hold the rotated widths as neighbouring pairs"),
        *EXPERTS,
        DeepSeekBalance(),
        settings.SharedExperts(absent=1),
        settings.DenseFirst(absent=3),
        settings.ExpertGroups(absent=(8, 4)),
        *SCORES,
        AllowedValues("moe_layer_freq", (1, None), "its MoE layers follow each other"),
        ConfigKey("num_nextn_predict_layers", "mtp.num_layers", 1, aliases=("num_mtp_layers",)),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.LATENT, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts(),
        *tensors.expert_bias(), *tensors.MTP,
    ),
    copies=tensors.mtp_copies,
    ignored=("pretraining_tp", "ep_size", "auto_map", "router_aux_loss_coef"),
)  # fmt: skip
