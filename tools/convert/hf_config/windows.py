"""Sliding windows in config.json: which layers have one, and how many tokens it spans.

Formulas: transformers' configuration class of each family. Versions of transformers differ when `layer_types` is absent.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config.family import UnsupportedModel, wrong_value

_TYPES = ("full_attention", "sliding_attention")
Flags = list[int]
"""1 for each layer with a window."""


def alternating(hf_config: Mapping[str, Any], layers: int) -> Flags | None:
    """A window in every even layer (gpt-oss)."""
    return [(layer + 1) % 2 for layer in range(layers)]


def last_layers(hf_config: Mapping[str, Any], layers: int, absent: int = 28) -> Flags | None:
    """A window in every layer from max_window_layers on (Qwen2, Qwen3). `absent`: the value of an absent key."""
    first = hf_config.get("max_window_layers", absent)
    return [int(layer >= first) for layer in range(layers)] if type(first) is int else None


def every_layer(hf_config: Mapping[str, Any], layers: int) -> Flags | None:
    """A window in every layer, unless max_window_layers tells some readers otherwise (Qwen3-MoE)."""
    return [1] * layers if not hf_config.get("max_window_layers") else None


def unclear(hf_config: Mapping[str, Any], layers: int) -> Flags | None:
    """No answer: versions of transformers disagree (Qwen2-MoE)."""
    return None


@dataclass(frozen=True)
class Windows:
    """sliding_window and layer_types.

    `absent`: the layers with a window when layer_types is absent. `size`: the value of an absent sliding_window. `switch`: the
    family has use_sliding_window, which must be on. `uniform`: transformers ignores layer_types for this family, so all layers
    are alike.
    """

    absent: Callable[[Mapping[str, Any], int], Flags | None]
    size: int | None = 4096
    switch: bool = True
    uniform: bool = False

    def names(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types", *(("use_sliding_window", "max_window_layers") if self.switch else ()))

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        types, is_on = hf_config.get("layer_types"), hf_config.get("use_sliding_window") or False
        if not isinstance(is_on, bool):
            yield Problem("config.json: use_sliding_window", is_on, "must be of type bool", "mend the config.json")
            return
        if types is not None and not (
            isinstance(types, list) and len(types) == model.num_layers and all(kind in _TYPES for kind in types)
        ):
            rule = f"must be {' or '.join(_TYPES)} for each of the {model.num_layers} layers"
            yield UnsupportedModel("config.json: layer_types", types, rule, "mend it, or convert another model")
            return
        size = hf_config.get("sliding_window", self.size) if is_on or not self.switch else None
        stated = None if types is None else [_TYPES.index(kind) for kind in types]
        if size is None:
            if stated and any(stated):
                rule = "must be set, and use_sliding_window on, where layer_types has sliding_attention"
                yield Problem("config.json: sliding_window", None, rule, "mend the config.json")
            return
        yield from self._layers(stated or self.absent(hf_config, model.num_layers), size, hf_config, model)

    def _layers(self, flags: Flags | None, size: Any, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        attention = model.attention
        if flags is None or (self.uniform and not all(flags)):
            rule = "must say which layers have the window: versions of transformers differ in what use_sliding_window means"
            fix = "state sliding_attention for all layers, or use_sliding_window = false" if self.uniform else "state it"
            yield UnsupportedModel("config.json: layer_types", hf_config.get("layer_types"), rule, fix)
        elif wrong := wrong_value("sliding_window", size, "attention.window_size_tokens"):
            yield wrong
        elif any(flags):
            attention.window_size_tokens = size
            if flags == alternating({}, model.num_layers):
                attention.window_layers = "alternate"
            elif not all(flags):
                attention.window_pattern = flags

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        flags = [int(arch.window_of_layer(model, layer) is not None) for layer in range(model.num_layers)]
        # Without a switch, transformers needs a size even if no layer has a window.
        hf_config["sliding_window"] = model.attention.window_size_tokens or (None if self.switch else self.size)
        if self.switch:
            hf_config["use_sliding_window"] = any(flags)
            hf_config["max_window_layers"] = flags.index(1) if any(flags) else model.num_layers
        if self.uniform and len(set(flags)) > 1:
            yield "its layers all have a window, or none"
        hf_config["layer_types"] = [_TYPES[flag] for flag in flags]
