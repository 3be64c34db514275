"""DeepSeek-V3.2: DeepSeek-V3 with sparse attention, counted and planned, not converted. Source: transformers models/deepseek_v32.

Torch-free.
"""

from __future__ import annotations

from parallel.legality.sparse_attention import NO_INDEXER
from tools.convert.families.deepseek_v3 import DEEPSEEK_V3, EXPERTS, SCORES
from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import DeepSeekBalance
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, Setting
from tools.convert.hf_config.latent_attention import latent_attention
from tools.convert.hf_config.mlp_types import MlpLayerTypes
from tools.convert.hf_config.rope import Rope


def indexer(heads: int) -> tuple[Setting, ...]:
    """The settings of the indexer. `heads`: the value of an absent index_n_heads."""
    return (
        ConfigKey("index_topk", "dsa.top_k", 2048),
        ConfigKey("index_n_heads", "dsa.num_index_heads", heads),
        ConfigKey("index_head_dim", "dsa.index_head_dim", 128),
    )


DEEPSEEK_V32 = Family(
    name="deepseek_v32",
    model_types=("deepseek_v32",),
    architecture="DeepseekV32ForCausalLM",
    settings=(
        *settings.decoder(1e-6),
        settings.PLAIN_MLP,
        *latent_attention(1536, "dsa.top_k"),
        *indexer(heads=64),
        Rope(),
        *EXPERTS,
        DeepSeekBalance(),
        settings.SharedExperts(absent=1),
        MlpLayerTypes(dense=3, counted=True),
        settings.ExpertGroups(absent=(8, 4)),
        *SCORES,
        AllowedValues("moe_layer_freq", (1, None), "its MoE layers follow each other"),
        ConfigKey("num_nextn_predict_layers", "mtp.num_layers", 1),
    ),
    planning_only=NO_INDEXER,
    ignored=(*DEEPSEEK_V3.ignored, "rope_interleave"),
)  # fmt: skip
