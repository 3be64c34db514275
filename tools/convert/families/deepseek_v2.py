"""DeepSeek-V2 (arXiv 2405.04434): latent attention, shared experts, softmax scores. Only the plain top-k of V2-Lite.

Source: transformers models/deepseek_v2. V2 (236B) scores a group by its best expert, megatron-core by the sum of its best
top_k / topk_group: other experts would be chosen, without an error (largest logit difference measured: 4.2).

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import DeepSeekBalance
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.latent_attention import latent_attention
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    architecture="DeepseekV2ForCausalLM",
    settings=(
        *settings.decoder(1e-6),
        settings.PLAIN_MLP,
        *latent_attention(),
        Rope(),
        ConfigKey("n_routed_experts", "moe.num_experts", 64),
        ConfigKey("num_experts_per_tok", "moe.top_k"),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1407),
        ConfigKey("routed_scaling_factor", "moe.router.scaling_factor", 1.0, float),
        DeepSeekBalance(),
        settings.SharedExperts(absent=2),
        settings.DenseFirst(absent=0),
        AllowedValues(
            "topk_method", ("greedy",),
            "transformers takes a group's best expert as its score, megatron-core the sum of several: other experts answer",
        ),
        AllowedValues("n_group", (1, None, 0), "with plain top-k there are no groups"),
        AllowedValues("topk_group", (1, None, 0), "with plain top-k there are no groups"),
        AllowedValues("norm_topk_prob", (False, None), "transformers does not normalise the weights of DeepSeek-V2"),
        AllowedValues("moe_layer_freq", (1, None), "its MoE layers follow each other"),
        AllowedValues("scoring_func", ("softmax", None), "the family's scores are softmax"),
        AllowedValues("mlp_bias", (False, None), "megatron-core has one switch for the biases of all linear layers"),
        *settings.softmax_router(**{"moe.router.normalize_top_k": False, "moe.router.scaling_factor": settings.REQUIRED,
                                 "moe.shared_gate": False, "mtp.num_layers": 0}),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.LATENT, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts()),
    ignored=("pretraining_tp", "ep_size", "auto_map", "router_aux_loss_coef"),
)  # fmt: skip
