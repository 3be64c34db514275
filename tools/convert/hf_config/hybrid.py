"""Gated delta nets in config.json: which layers have one, and its widths.

Source: transformers models/qwen3_next and models/qwen3_5.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config.family import ConfigKey, Setting, UnsupportedModel

_TYPES = ("full_attention", "linear_attention")
_INTERVAL = 4


@dataclass(frozen=True)
class DeltaLayers:
    """layer_types, or full_attention_interval: every so many layers one has attention."""

    def names(self) -> tuple[str, ...]:
        return ("layer_types", "full_attention_interval")

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        types, interval = hf_config.get("layer_types"), hf_config.get("full_attention_interval") or _INTERVAL
        if types is None:
            if type(interval) is not int or interval < 1:
                yield Problem(
                    "config.json: full_attention_interval", interval, "must be an int from 1 on", "mend the config.json"
                )
                return
            flags = [int((layer + 1) % interval != 0) for layer in range(model.num_layers)]
        elif isinstance(types, list) and len(types) == model.num_layers and all(kind in _TYPES for kind in types):
            flags = [_TYPES.index(kind) for kind in types]
        else:
            rule = f"must be {' or '.join(_TYPES)} for each of the {model.num_layers} layers"
            yield UnsupportedModel("config.json: layer_types", types, rule, "mend it, or convert another model")
            return
        model.delta_net.pattern = _shortest(flags) if any(flags) else None

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        flags = [int(flag) for flag in arch.delta_layers(model)]
        hf_config["layer_types"] = [_TYPES[flag] for flag in flags]
        period = _shortest(flags)
        if period == [1] * (len(period) - 1) + [0]:
            # Readers older than transformers 5 know this key only.
            hf_config["full_attention_interval"] = len(period)
        return iter(())


# Keys for the number of prediction depths. Qwen3-Next's published config.json has neither.
DEPTH_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_OWN_TABLES = "mtp_use_dedicated_embeddings"


@dataclass(frozen=True)
class OneDepth:
    """The number of prediction depths under `hf_key`: several would share one projection and its norms, megatron-core's don't.

    A depth with tables of its own is none that megatron-core builds. It is left out.
    """

    hf_key: str

    def names(self) -> tuple[str, ...]:
        return (self.hf_key, _OWN_TABLES)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        value = 0 if hf_config.get(_OWN_TABLES) else hf_config.get(self.hf_key) or 0
        if value not in (0, 1):
            rule = "must be 0 or 1: several prediction depths would share one projection, megatron-core's have one each"
            yield UnsupportedModel(f"config.json: {self.hf_key}", value, rule, "convert a model with one depth")
            return
        model.mtp.num_layers = int(value)

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config[self.hf_key] = model.mtp.num_layers
        if model.mtp.num_layers > 1:
            yield f"it has one prediction depth at most, not {model.mtp.num_layers}"


def _shortest(flags: list[int]) -> list[int]:
    """The shortest list that gives `flags` when it repeats."""
    sizes = range(1, len(flags) + 1)
    return next(flags[:size] for size in sizes if all(flags[i] == flags[i % size] for i in range(len(flags))))


DELTA_NET: tuple[Setting, ...] = (
    DeltaLayers(),
    ConfigKey("linear_num_key_heads", "delta_net.num_key_heads", 16),
    ConfigKey("linear_num_value_heads", "delta_net.num_value_heads", 32),
    ConfigKey("linear_key_head_dim", "delta_net.key_head_dim", 128),
    ConfigKey("linear_value_head_dim", "delta_net.value_head_dim", 128),
    ConfigKey("linear_conv_kernel_dim", "delta_net.conv_size_tokens", 4),
)
