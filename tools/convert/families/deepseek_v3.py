"""DeepSeek-V3 and R1 (arXiv 2412.19437), Kimi-K2: latent attention, sigmoid scores with a selection bias, MTP.

Source: transformers models/deepseek_v3 and the files' own modeling_deepseek.py. fp8 files are dequantised when read.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.family import Family, Key, Only
from tools.convert.hf_config.latent import latent_attention
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import mapping as tensors

SIGMOID_ROUTER = (
    settings.Always("moe.router.score", "sigmoid"),
    settings.Always("moe.router.expert_bias", True),
    settings.Always("moe.router.bias", False),
    settings.Always("moe.router.normalize_top_k", True),
    settings.Always("moe.shared_gate", False),
    Only("norm_topk_prob", (True,), "megatron-core always normalises sigmoid scores"),
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
        Only("rope_interleave", (True,), "the tensors hold the rotated widths as neighbouring pairs"),
        Key("n_routed_experts", "moe.num_experts", 256),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("moe_intermediate_size", "moe.ffn_hidden_size", 2048),
        Key("routed_scaling_factor", "moe.router.scaling_factor", 2.5, float),
        settings.SharedExperts(),
        settings.DenseFirst(absent=3),
        settings.Groups(absent=(8, 4)),
        *SIGMOID_ROUTER,
        Only("topk_method", ("noaux_tc", None), "the family selects with a bias on sigmoid scores"),
        Only("scoring_func", ("sigmoid", None), "the family's scores are sigmoid"),
        Only("moe_layer_freq", (1, None), "its MoE layers follow each other"),
        Key("num_nextn_predict_layers", "mtp.num_layers", 1),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.LATENT, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts(),
        *tensors.EXPERT_BIAS, *tensors.MTP,
    ),
    copies=tensors.mtp_copies,
    ignored=("aux_loss_alpha", "seq_aux", "pretraining_tp", "ep_size", "auto_map", "router_aux_loss_coef"),
)  # fmt: skip
