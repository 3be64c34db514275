"""Dense Llama 1 to 3 and Mistral (the same tensors; Mistral adds a sliding window). Source: transformers models/llama. [p]"""

from __future__ import annotations

from tools.convert import parts
from tools.convert.family import Always, Family, Key, Only
from tools.convert.rope import Rope

_TENSORS = (*parts.EMBEDDING, *parts.ATTENTION, *parts.DENSE_MLP)

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    settings=(
        *parts.decoder(eps=1e-6),
        parts.PLAIN_MLP,
        parts.HeadDim(),
        Rope(),
        Only("attention_bias", (False, None), "megatron-core has one switch for the biases of all products"),
        Only("mlp_bias", (False, None), "megatron-core has one switch for the biases of all products"),
        parts.WholeHeads(),
        Only("pretraining_tp", (1, None), "its products are summed in another order"),
        *parts.plain_attention(),
        parts.Dense(),
    ),
    tensors=_TENSORS,
)

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    settings=(
        *parts.decoder(eps=1e-6),
        parts.PLAIN_MLP,
        parts.HeadDim(),
        Rope(),
        Key("sliding_window", "attention.window_size_tokens", 4096),
        Always("attention.window_layers", "all"),
        *parts.plain_attention(**{"attention.window_size_tokens": parts.REQUIRED}),
        parts.Dense(),
    ),
    tensors=_TENSORS,
)
