"""ERNIE 4.5 MoE (Baidu): neighbouring dims rotated, softmax scores with a selection bias.

Source: transformers models/ernie4_5_moe.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family
from tools.convert.hf_config.mlp_types import put_moe_layers
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors
from tools.convert.tensors.row_mappings import one_row

_START, _END, _STEP = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"


@dataclass(frozen=True)
class LayerRange:
    """Layer i is an MoE layer when it lies in [start, end] and i + 1 is a multiple of the interval. End -1: the last layer."""

    def names(self) -> tuple[str, ...]:
        return (_START, _END, _STEP)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        start, end, step = (hf_config.get(name, absent) for name, absent in ((_START, 1), (_END, -1), (_STEP, 1)))
        if any(type(value) is not int for value in (start, end, step)) or step < 1:
            rule = "must be ints, the interval from 1 on: they say which layers have experts"
            yield Problem(f"config.json: {_START}, {_END}, {_STEP}", [start, end, step], rule, "mend the config.json")
            return
        end = model.num_layers - 1 if end == -1 else end
        put_moe_layers(model, [int(start <= layer <= end and (layer + 1) % step == 0) for layer in range(model.num_layers)])

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        layers = [layer for layer, is_moe in enumerate(arch.moe_layers(model)) if is_moe]
        if not layers:
            yield "it has experts"
            return
        step = layers[1] - layers[0] if len(layers) > 1 else 1
        if layers != [layer for layer in range(layers[0], layers[-1] + 1) if (layer + 1) % step == 0]:
            yield f"its MoE layers have one distance, whose multiples they are, these are {layers}"
        hf_config |= {_START: layers[0], _END: layers[-1], _STEP: step}


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    model_types=("ernie4_5_moe",),
    architecture="Ernie4_5_MoeForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(4), tied=True),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(theta=500000.0, interleaved=True),
        AllowedValues("use_bias", (False, None), "its experts have no biases, and its output layer would have one"),
        *settings.plain_attention(),
        ConfigKey("moe_num_experts", "moe.num_experts", 64, aliases=("num_experts",)),
        ConfigKey("moe_k", "moe.top_k", 6, aliases=("num_experts_per_tok",)),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1536),
        settings.SharedExperts(absent=2, hf_key="moe_num_shared_experts", optional=True),
        LayerRange(),
        AuxLossCoefficient(absent=0.001),
        *settings.softmax_router(
            **{"moe.router.expert_bias": True, "moe.router.normalize_top_k": True, "moe.shared_gate": False}
        ),
        AllowedValues("moe_norm_min", (1e-12, None), "the chosen weights are divided by their sum, however small"),
        AllowedValues("num_nextn_predict_layers", (0, None), "transformers has no code for its prediction depth"),
    ),
    tensors=(
        *tensors.EMBEDDING, *tensors.ATTENTION, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts(),
        *tensors.expert_bias("model.layers.{L}.mlp.moe_statics.e_score_correction_bias", join=one_row),
    ),
)  # fmt: skip
