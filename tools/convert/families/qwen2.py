"""Dense Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and values. Source: transformers models/qwen2.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.family import Family
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.windows import Windows, last_layers
from tools.convert.tensors import shared_rules as tensors

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(32)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        Windows(last_layers),
        *settings.plain_attention("attention.window_size_tokens", **{"attention.qkv_bias": True}),
        settings.NoExperts(),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP),
)
