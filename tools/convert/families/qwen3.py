"""Dense Qwen3 (arXiv 2505.09388): q/k norms per head. Source: transformers models/qwen3.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.biases import BIASES, Biases
from tools.convert.hf_config.family import Family
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.windows import Windows, last_layers
from tools.convert.tensors import shared_rules as tensors

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(32)),
        settings.PLAIN_MLP,
        settings.HeadDim(absent=128),
        Rope(),
        Biases(),
        Windows(last_layers),
        *settings.plain_attention(*BIASES, "attention.window_size_tokens", **{"attention.qk_norm": True}),
        settings.NoExperts(),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP),
)
