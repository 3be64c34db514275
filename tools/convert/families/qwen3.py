"""Dense Qwen3 (arXiv 2505.09388): q/k norms per head. Source: transformers models/qwen3. [p]"""

from __future__ import annotations

from tools.convert import settings, tensors
from tools.convert.biases import BIASES, Biases
from tools.convert.family import Family
from tools.convert.rope import Rope
from tools.convert.windows import Windows, last_layers

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
        settings.Dense(),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP),
)
