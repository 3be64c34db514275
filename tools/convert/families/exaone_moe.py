"""K-EXAONE: windows in most layers, and positions in those layers only, sigmoid router. Source: transformers models/exaone_moe.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.convert.hf_config import settings
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, Setting
from tools.convert.hf_config.mlp_types import MlpLayerTypes
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.rotated_layers import RotatedWindows
from tools.convert.hf_config.windows import Flags, Windows
from tools.convert.tensors import shared_rules as tensors


def by_pattern(hf_config: Mapping[str, Any], layers: int) -> Flags | None:
    """A window in every layer but each sliding_window_pattern-th one. None: a word, which transformers can't read."""
    pattern = hf_config.get("sliding_window_pattern", 4)
    return [int((layer + 1) % pattern != 0) for layer in range(layers)] if type(pattern) is int and pattern > 0 else None


def mlp_and_attention(windowless: bool) -> tuple[Setting, ...]:
    """Also of EXAONE 4, which has models without windows."""
    return (
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        Windows(by_pattern, switch=False),
        RotatedWindows(windowless),
        *settings.plain_attention("attention.window_size_tokens", "position.layer_pattern", **{"attention.qk_norm": True}),
    )


EXAONE_MOE = Family(
    name="exaone_moe",
    model_types=("exaone_moe",),
    architecture="ExaoneMoeForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(32)),
        *mlp_and_attention(windowless=False),
        ConfigKey("num_experts", "moe.num_experts", 64),
        ConfigKey("num_experts_per_tok", "moe.top_k", 8),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1024),
        ConfigKey("routed_scaling_factor", "moe.router.scaling_factor", 2.5, float),
        settings.SharedExperts(absent=1, hf_key="num_shared_experts"),
        MlpLayerTypes(dense=1, counted=True),
        settings.ExpertGroups(absent=(1, 1)),
        *settings.sigmoid_router(),
        AllowedValues("topk_method", ("noaux_tc", None), "the family selects with a bias on sigmoid scores"),
        AllowedValues("scoring_func", ("sigmoid", None), "the family's scores are sigmoid"),
        AllowedValues("num_nextn_predict_layers", (0, None), "transformers has no code for its prediction depth"),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts(),
        *tensors.expert_bias("model.layers.{L}.mlp.e_score_correction_bias"),
    ),
    ignored=("sliding_window_pattern",),
)  # fmt: skip
