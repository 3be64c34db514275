"""Dense Llama 1 to 3 and Mistral (the same tensors; Mistral adds a sliding window). Source: transformers models/llama.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.biases import BIASES, Biases
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, FixedValue
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

_TENSORS = (*tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP)

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(None)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        Biases(mlp=True),
        settings.WholeHeads(),
        AllowedValues("pretraining_tp", (1, None), "its products are summed in another order"),
        *settings.plain_attention(*BIASES),
        settings.NoExperts(),
    ),
    tensors=_TENSORS,
)

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    settings=(
        *settings.decoder(1e-6, settings.KeyValueHeads(8)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(),
        ConfigKey("sliding_window", "attention.window_size_tokens", 4096),
        AllowedValues("layer_types", (None,), "transformers builds another architecture (Ministral) where it is stated"),
        FixedValue("attention.window_layers", "all"),
        *settings.plain_attention("attention.window_size_tokens"),
        settings.NoExperts(),
    ),
    tensors=_TENSORS,
)
