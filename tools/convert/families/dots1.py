"""dots.llm1 (arXiv 2506.05767): grouped queries with q/k norms per head, sigmoid router, shared experts.

Source: transformers models/dots1.

Torch-free.
"""

from __future__ import annotations

from functools import partial

from tools.convert.hf_config import settings
from tools.convert.hf_config.biases import BIASES, Biases
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.windows import Windows, last_layers
from tools.convert.tensors import shared_rules as tensors

DOTS1 = Family(
    name="dots1",
    model_types=("dots1",),
    architecture="Dots1ForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(32)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        Biases(),
        Windows(partial(last_layers, absent=62), switch=False),
        *settings.plain_attention(*BIASES, "attention.window_size_tokens", **{"attention.qk_norm": True}),
        ConfigKey("n_routed_experts", "moe.num_experts", aliases=("num_local_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k"),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1408),
        ConfigKey("routed_scaling_factor", "moe.router.scaling_factor", 1.0, float),
        settings.SharedExperts(absent=0),
        settings.DenseFirst(absent=0),
        settings.ExpertGroups(absent=(1, 1)),
        *settings.sigmoid_router(normalized=False),
        AllowedValues("topk_method", ("noaux_tc", None), "the family selects with a bias on sigmoid scores"),
        AllowedValues("scoring_func", ("sigmoid", None), "the family's scores are sigmoid"),
        AllowedValues("moe_layer_freq", (1, None), "its MoE layers follow each other"),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts(),
        *tensors.expert_bias(),
    ),
)  # fmt: skip
