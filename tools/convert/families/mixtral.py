"""Mixtral (Mistral AI): every layer sparse, softmax over the chosen logits. Source: transformers models/mixtral.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import ConfigKey, Family, FixedValue
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

_L = "model.layers.{L}.block_sparse_moe."

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(8), ffn="moe.ffn_hidden_size"),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(theta=1e6),
        ConfigKey("sliding_window", "attention.window_size_tokens", None),
        FixedValue("attention.window_layers", "all"),
        *settings.plain_attention("attention.window_size_tokens"),
        ConfigKey("num_local_experts", "moe.num_experts", 8, aliases=("num_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k", 2),
        ConfigKey("router_jitter_noise", "moe.router.jitter_eps", 0.0, float),
        settings.AllSparse(),
        AuxLossCoefficient(absent=0.001),
        *settings.softmax_router(**{"moe.router.normalize_top_k": True, "moe.shared_ffn_hidden_size": None}),
    ),
    tensors=(
        *tensors.EMBEDDING,
        *tensors.ATTENTION,
        *tensors.experts(_L + "gate.weight", _L + "experts.{E}.", ("w1", "w3", "w2")),
    ),
)
