"""MiniMax-M2: q/k norms over all heads, partly rotated heads, sigmoid router, no shared expert. Source: transformers
models/minimax_m2.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, FixedValue
from tools.convert.hf_config.rope import Rope, RotaryDim
from tools.convert.tensors import shared_rules as tensors

_M = "model.layers.{L}.block_sparse_moe."

MINIMAX_M2 = Family(
    name="minimax_m2",
    model_types=("minimax_m2",),
    architecture="MiniMaxM2ForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(8), ffn="moe.ffn_hidden_size"),
        settings.PLAIN_MLP,
        settings.HeadDim(absent=128),
        Rope(theta=5000000.0, fraction=1.0),
        RotaryDim(),
        AllowedValues("use_qk_norm", (True,), "the family always has these norms"),
        AllowedValues("qk_norm_type", ("per_layer", None), "its norms of queries and keys span the heads of a layer"),
        *settings.plain_attention(**{"attention.qk_norm": True, "attention.qk_norm_span": "all_heads"}),
        ConfigKey("num_local_experts", "moe.num_experts", 256, aliases=("num_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k", 8),
        ConfigKey("router_jitter_noise", "moe.router.jitter_eps", 0.0, float),
        settings.AllSparse(),
        AuxLossCoefficient(absent=0.001),
        *settings.sigmoid_router(),
        FixedValue("moe.router.num_groups", None),
        FixedValue("moe.router.scaling_factor", 1.0),
        FixedValue("moe.shared_ffn_hidden_size", None),
        AllowedValues("scoring_func", ("sigmoid", None), "the family's scores are sigmoid"),
        AllowedValues("use_routing_bias", (True, None), "the family selects with a bias"),
        AllowedValues("shared_intermediate_size", (0, None), "transformers builds no shared expert"),
    ),
    tensors=(
        *tensors.EMBEDDING,
        *tensors.ATTENTION,
        *tensors.experts(_M + "gate.weight", _M + "experts.{E}.", ("w1", "w3", "w2")),
        *tensors.expert_bias(_M + "e_score_correction_bias"),
    ),
    ignored=("mtp_transformer_layers", "num_mtp_modules", "use_mtp", "attn_type_list"),
)
