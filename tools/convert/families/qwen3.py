"""Dense Qwen3 (arXiv 2505.09388): q/k norms per head. Source: transformers models/qwen3. [p]"""

from __future__ import annotations

from tools.convert import parts
from tools.convert.family import Family, Only
from tools.convert.rope import Rope

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    settings=(
        *parts.decoder(eps=1e-6),
        parts.PLAIN_MLP,
        parts.HeadDim(absent=128),
        Rope(),
        Only("attention_bias", (False, None), "its output bias has no counterpart here"),
        Only("use_sliding_window", (False, None), "windows in some layers can't be built"),
        *parts.plain_attention(**{"attention.qk_norm": True}),
        parts.Dense(),
    ),
    tensors=(*parts.EMBEDDING, *parts.ATTENTION, *parts.DENSE_MLP),
    ignored=("sliding_window", "max_window_layers"),
)
