"""Dense Qwen3 (arXiv 2505.09388): q/k norms per head. Source: transformers models/qwen3. [p]"""

from __future__ import annotations

from tools.convert import settings, tensors
from tools.convert.family import Family, Only
from tools.convert.rope import Rope

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    settings=(
        *settings.decoder(eps=1e-6),
        settings.PLAIN_MLP,
        settings.HeadDim(absent=128),
        Rope(),
        Only("attention_bias", (False, None), "its output bias has no counterpart here"),
        Only("use_sliding_window", (False, None), "windows in some layers can't be built"),
        *settings.plain_attention(**{"attention.qk_norm": True}),
        settings.Dense(),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP),
    ignored=("sliding_window", "max_window_layers"),
)
