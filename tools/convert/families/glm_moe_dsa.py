"""GLM-5: GLM-4.7-Flash's kind of layers with sparse attention, counted and planned, not converted.

Source: transformers models/glm_moe_dsa.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel.legality.sparse_attention import NO_INDEXER
from tools.convert.families.deepseek_v3 import EXPERTS, SCORES
from tools.convert.families.deepseek_v32 import indexer
from tools.convert.families.glm4_moe_lite import GLM4_MOE_LITE
from tools.convert.hf_config import settings
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.latent_attention import latent_attention
from tools.convert.hf_config.mlp_types import MlpLayerTypes
from tools.convert.hf_config.rope import Rope


@dataclass(frozen=True)
class EveryLayerHasAnIndexer:
    """indexer_types, index_topk_pattern or index_topk_freq: layers that take the keys of a layer below (arXiv 2603.12201)."""

    def names(self) -> tuple[str, ...]:
        return ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        for name, alone in (("indexer_types", {"full"}), ("index_topk_pattern", {"F", "full"})):
            types = hf_config.get(name)
            if types is not None and set(types) - alone:
                rule = "must name an indexer of its own for every layer: layers that share one are not counted yet"
                yield Problem(f"config.json: {name}", types, rule, "take a model whose layers all have an indexer, such as GLM-5")
        stated = any(hf_config.get(name) is not None for name in ("indexer_types", "index_topk_pattern"))
        if not stated and hf_config.get("index_topk_freq", 1) > 1:
            rule = "must be 1: layers that share an indexer are not counted yet"
            yield Problem(
                "config.json: index_topk_freq", hf_config["index_topk_freq"], rule, "take a model with 1, such as GLM-5"
            )

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        return iter(())


GLM_MOE_DSA = Family(
    name="glm_moe_dsa",
    model_types=("glm_moe_dsa",),
    architecture="GlmMoeDsaForCausalLM",
    settings=(
        *settings.decoder(1e-5),
        settings.PLAIN_MLP,
        *latent_attention(2048, "dsa.top_k"),
        *indexer(heads=32),
        EveryLayerHasAnIndexer(),
        Rope(fraction=1.0),
        *EXPERTS,
        settings.SharedExperts(absent=1),
        MlpLayerTypes(dense=3, counted=True),
        settings.ExpertGroups(absent=(1, 1)),
        *SCORES,
        AllowedValues("moe_layer_freq", (1, None), "mlp_layer_types says which layers have experts"),
        ConfigKey("num_nextn_predict_layers", "mtp.num_layers", 1),
    ),
    planning_only=NO_INDEXER,
    ignored=(
        *GLM4_MOE_LITE.ignored, "ep_size", "rope_interleave", "indexer_rope_interleave", "index_share_for_mtp_iteration",
        "moe_router_dtype",
    ),
)  # fmt: skip
