"""SmolLM3: a Llama in which every fourth layer has no positions. Source: transformers models/smollm3.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.biases import BIASES, Biases
from tools.convert.hf_config.family import Family
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.rotated_layers import NoRopeLayers
from tools.convert.hf_config.windows import Windows, unclear
from tools.convert.tensors import shared_rules as tensors

SMOLLM3 = Family(
    name="smollm3",
    model_types=("smollm3",),
    architecture="SmolLM3ForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(4), tied=True),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(theta=2000000.0),
        NoRopeLayers(),
        Biases(mlp=True),
        Windows(unclear, size=None),
        *settings.plain_attention(*BIASES, "attention.window_size_tokens", "position.layer_pattern"),
        settings.NoExperts(),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP),
)
