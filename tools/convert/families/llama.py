"""Dense Llama 1 to 3 and Mistral (the same tensors; Mistral adds a sliding window). Source: transformers models/llama. [p]"""

from __future__ import annotations

from tools.convert import settings, tensors
from tools.convert.family import Always, Family, Key, Only
from tools.convert.rope import Rope

_TENSORS = (*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP)

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    settings=(
        *settings.decoder(eps=1e-6),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        Only("attention_bias", (False, None), "megatron-core has one switch for the biases of all products"),
        Only("mlp_bias", (False, None), "megatron-core has one switch for the biases of all products"),
        settings.WholeHeads(),
        Only("pretraining_tp", (1, None), "its products are summed in another order"),
        *settings.plain_attention(),
        settings.Dense(),
    ),
    tensors=_TENSORS,
)

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    settings=(
        *settings.decoder(eps=1e-6),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        Key("sliding_window", "attention.window_size_tokens", 4096),
        Always("attention.window_layers", "all"),
        *settings.plain_attention(**{"attention.window_size_tokens": settings.REQUIRED}),
        settings.Dense(),
    ),
    tensors=_TENSORS,
)
