"""Llama 4's language model: counted and planned, not converted. Source: transformers models/llama4.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from tools.convert.hf_config import settings
from tools.convert.hf_config.family import ConfigKey, Family, FixedValue
from tools.convert.hf_config.rope import Rope


@dataclass(frozen=True)
class Interleaved:
    """interleave_moe_layer_step: layers step-1, 2 step-1, … are MoE layers. Each has one shared expert as wide as a routed
    expert.
    """

    def names(self) -> tuple[str, ...]:
        return ("interleave_moe_layer_step", "moe_layers")

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        step = hf_config.get("interleave_moe_layer_step", 1)
        if not isinstance(step, int) or step < 1:
            yield Problem("config.json: interleave_moe_layer_step", step, "must be a positive int", "mend the config.json")
            return
        model.moe.layer_pattern = None if step == 1 else [int((i + 1) % step == 0) for i in range(model.num_layers)]
        model.moe.shared_ffn_hidden_size = model.moe.ffn_hidden_size

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        yield "it is for planning only"


LLAMA4 = Family(
    name="llama4",
    model_types=("llama4_text", "llama4"),
    architecture="Llama4ForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(8), ffn="moe.ffn_hidden_size"),
        ConfigKey("intermediate_size_mlp", "ffn_hidden_size", 16384),
        settings.HeadDim(absent=128),
        Rope(theta=500000.0),
        *settings.plain_attention(),
        ConfigKey("num_local_experts", "moe.num_experts", 16),
        ConfigKey("num_experts_per_tok", "moe.top_k", 1),
        Interleaved(),
        FixedValue("moe.router.score", "sigmoid"),
        FixedValue("moe.router.normalize_top_k", False),
    ),
    planning_only="chunked attention, layers without positions, L2 norms of queries and keys, weights on the experts' input",
    ignored=(
        "use_qk_norm", "no_rope_layers", "no_rope_layer_interval", "attention_chunk_size", "attn_temperature_tuning",
        "floor_scale", "attn_scale", "attention_bias", "hidden_act", 
        "router_aux_loss_coef", "router_jitter_noise", "for_llm_compressor",
    ),
)  # fmt: skip
