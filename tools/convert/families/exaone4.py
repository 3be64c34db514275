"""EXAONE 4 (arXiv 2507.11407): norms after attention and MLP, windows in most layers, and positions in those layers only.

Source: transformers models/exaone4.

Torch-free.
"""

from __future__ import annotations

from tools.convert.families.exaone_moe import mlp_and_attention
from tools.convert.hf_config import settings
from tools.convert.hf_config.family import Family
from tools.convert.tensors import shared_rules as tensors

EXAONE4 = Family(
    name="exaone4",
    model_types=("exaone4",),
    architecture="Exaone4ForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(32), norm_position="after"),
        *mlp_and_attention(windowless=True),
        settings.NoExperts(),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.attention(norms=tensors.POST_NORMS), *tensors.DENSE_MLP),
    ignored=("sliding_window_pattern",),
)
