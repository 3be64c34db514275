"""Llama 4's language model: chunked attention, layers without positions, top-1 experts whose input is weighted, a shared expert.

Source: transformers models/llama4.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.families.hunyuan_v1 import OneSharedExpert
from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, FixedValue, tensor_rule, wrong_value
from tools.convert.hf_config.mlp_types import put_moe_layers
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.rotated_layers import NoRopeLayers, rotated_layers
from tools.convert.tensors import shared_rules as tensors
from tools.convert.tensors.row_mappings import stacked_columns

_TYPES = ("full_attention", "chunked_attention")
_CHUNK, _TUNED, _STEP, _GROWTH = "attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale"


@dataclass(frozen=True)
class Interleaved:
    """moe_layers, the numbers of the MoE layers. Absent: layers step - 1, 2 step - 1, … of interleave_moe_layer_step."""

    def names(self) -> tuple[str, ...]:
        return ("interleave_moe_layer_step", "moe_layers")

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        step, numbers = hf_config.get("interleave_moe_layer_step", 1), hf_config.get("moe_layers")
        if type(step) is not int or step < 1:
            yield Problem("config.json: interleave_moe_layer_step", step, "must be a positive int", "mend the config.json")
            return
        numbers = list(range(step - 1, model.num_layers, step)) if numbers is None else numbers
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            yield Problem("config.json: moe_layers", numbers, "must be a list of layers", "mend the config.json")
            return
        put_moe_layers(model, [int(layer in numbers) for layer in range(model.num_layers)])

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        numbers = [layer for layer, is_moe in enumerate(arch.moe_layers(model)) if is_moe]
        if not numbers:
            yield "it has experts"
            return
        # Other readers than transformers know the step only.
        step = numbers[0] + 1
        hf_config["interleave_moe_layer_step"] = step if numbers == list(range(step - 1, model.num_layers, step)) else 1
        hf_config["moe_layers"] = numbers


@dataclass(frozen=True)
class Chunks:
    """attention_chunk_size and layer_types. Absent types: rotated layers are chunked. Must follow `NoRopeLayers`."""

    def names(self) -> tuple[str, ...]:
        return (_CHUNK, "layer_types")

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        size, types = hf_config.get(_CHUNK, 8192), hf_config.get("layer_types")
        flags = rotated_layers(model)
        if types is not None:
            if not isinstance(types, list) or len(types) != model.num_layers or any(kind not in _TYPES for kind in types):
                rule = f"must be {' or '.join(_TYPES)} for each of the {model.num_layers} layers"
                yield Problem("config.json: layer_types", types, rule, "mend the config.json")
                return
            flags = [_TYPES.index(kind) for kind in types]
        if not any(flags):
            return
        if wrong := wrong_value(_CHUNK, size, "attention.window_size_tokens"):
            yield wrong
            return
        attention = model.attention
        attention.window_kind, attention.window_size_tokens = "chunked", size
        attention.window_pattern = None if all(flags) else flags

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        flags = [int(arch.window_of_layer(model, layer) is not None) for layer in range(model.num_layers)]
        if any(flags) and model.attention.window_kind != "chunked":
            yield "its windows are chunks"
        hf_config[_CHUNK] = model.attention.window_size_tokens or 8192
        hf_config["layer_types"] = [_TYPES[flag] for flag in flags]


@dataclass(frozen=True)
class Temperature:
    """attn_temperature_tuning, which published files also give as a number, attn_scale and floor_scale."""

    def names(self) -> tuple[str, ...]:
        return (_TUNED, _STEP, _GROWTH)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        growth, step = hf_config.get(_GROWTH, 0.1), hf_config.get(_STEP, 8192)
        wrong = wrong_value(_GROWTH, growth, "attention.temperature_growth", (float,))
        wrong = wrong or wrong_value(_STEP, step, "attention.temperature_step_tokens")
        if wrong:
            yield wrong
            return
        # It is that of layers without positions.
        if hf_config.get(_TUNED, True) and not all(rotated_layers(model)):
            model.attention.temperature_growth, model.attention.temperature_step_tokens = float(growth), step

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        attention = model.attention
        hf_config[_TUNED] = attention.temperature_growth > 0
        if attention.temperature_growth:
            hf_config[_GROWTH], hf_config[_STEP] = attention.temperature_growth, attention.temperature_step_tokens
        return iter(())


_F = "model.layers.{L}.feed_forward."

LLAMA4 = Family(
    name="llama4",
    model_types=("llama4_text", "llama4"),
    architecture="Llama4ForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(8), ffn="moe.ffn_hidden_size"),
        ConfigKey("intermediate_size_mlp", "ffn_hidden_size", 16384),
        settings.PLAIN_MLP,
        settings.HeadDim(absent=128),
        Rope(theta=500000.0, interleaved=True),
        NoRopeLayers(empty_is_absent=True),
        Chunks(),
        Temperature(),
        ConfigKey("use_qk_norm", "attention.qk_l2_norm", True, bool),
        AllowedValues("attention_bias", (False, None), "its output bias has no counterpart here"),
        *settings.plain_attention(
            "attention.window_size_tokens", "attention.window_kind", "attention.temperature_growth", "attention.qk_l2_norm",
            "position.layer_pattern", **{"moe.weights_on_input": True},
        ),
        ConfigKey("num_local_experts", "moe.num_experts", 16),
        AllowedValues("num_experts_per_tok", (1,), "megatron-core weights the input of one expert, not of several"),
        FixedValue("moe.top_k", 1),
        Interleaved(),
        OneSharedExpert(),
        AuxLossCoefficient(absent=0.001),
        *settings.softmax_router(**{
            "moe.router.score": "sigmoid", "moe.router.normalize_top_k": False, "moe.shared_gate": False,
        }),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.ATTENTION, *tensors.dense_mlp(_F), *tensors.shared_experts("shared_expert", _F),
        tensor_rule("moe", "mlp.router.weight", _F + "router.weight"),
        tensor_rule("expert", "mlp.experts.linear_fc1.weight", _F + "experts.gate_up_proj", join=stacked_columns),
        tensor_rule("expert", "mlp.experts.linear_fc2.weight", _F + "experts.down_proj", join=stacked_columns),
    ),
    # transformers reads neither.
    ignored=("router_jitter_noise", "for_llm_compressor"),
)  # fmt: skip
