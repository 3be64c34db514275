"""Mixtral (Mistral AI): every layer sparse, softmax over the chosen logits. Source: transformers models/mixtral. [p]"""

from __future__ import annotations

from tools.convert import parts
from tools.convert.family import Always, Family, Key
from tools.convert.rope import Rope

_L = "model.layers.{L}.block_sparse_moe."

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    settings=(
        *parts.decoder(eps=1e-5, ffn="moe.ffn_hidden_size"),
        parts.PLAIN_MLP,
        parts.HeadDim(),
        Rope(theta=1e6),
        Key("sliding_window", "attention.window_size_tokens", None),
        Always("attention.window_layers", "all"),
        *parts.plain_attention(**{"attention.window_size_tokens": parts.REQUIRED}),
        Key("num_local_experts", "moe.num_experts", 8),
        Key("num_experts_per_tok", "moe.top_k", 2),
        Key("router_aux_loss_coef", "moe.router.aux_loss_coeff", 0.001, float),
        Key("router_jitter_noise", "moe.router.jitter_eps", 0.0, float),
        parts.AllSparse(),
        *parts.softmax_router(**{"moe.router.normalize_top_k": True, "moe.shared_ffn_hidden_size": None}),
    ),
    tensors=(
        *parts.EMBEDDING,
        *parts.ATTENTION,
        *parts.experts(_L + "gate.weight", _L + "experts.{E}.", ("w1", "w3", "w2")),
    ),
)
