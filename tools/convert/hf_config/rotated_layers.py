"""Layers without positions in config.json: no_rope_layers of SmolLM3, and EXAONE's rotation in the layers with a window.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config.family import wrong_value

_LIST, _INTERVAL = "no_rope_layers", "no_rope_layer_interval"


def rotated_layers(model: Model) -> list[int]:
    """For each layer 1 (rotated) or 0 (no positions)."""
    return model.position.layer_pattern or [1] * model.num_layers


@dataclass(frozen=True)
class NoRopeLayers:
    """no_rope_layers, whose 1 means a rotated layer. Absent: each no_rope_layer_interval-th layer has no positions.

    `empty_is_absent`: so does an empty list (Llama 4).
    """

    interval: int = 4
    empty_is_absent: bool = False

    def names(self) -> tuple[str, ...]:
        return (_LIST, _INTERVAL)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        flags, interval = hf_config.get(_LIST), hf_config.get(_INTERVAL, self.interval)
        if flags is None or (self.empty_is_absent and flags == []):
            if wrong := wrong_value(_INTERVAL, interval, "moe.layer_frequency"):
                yield wrong
                return
            flags = [int((layer + 1) % interval != 0) for layer in range(model.num_layers)]
        if not isinstance(flags, list) or len(flags) < model.num_layers or any(flag not in (0, 1) for flag in flags):
            rule = f"must have 0 or 1 for each of the {model.num_layers} layers"
            yield Problem(f"config.json: {_LIST}", flags, rule, "mend the config.json")
            return
        flags = [int(flag) for flag in flags[: model.num_layers]]
        model.position.layer_pattern = None if all(flags) else flags

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config[_LIST] = rotated_layers(model)
        return iter(())


@dataclass(frozen=True)
class RotatedWindows:
    """Where some layers have a window, those are rotated and the others are not. Must follow `Windows`. No key of config.json.

    `windowless`: the family has models without windows, whose layers are all rotated and whose sliding_window is null.
    """

    windowless: bool

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        if not self.windowless and hf_config.get("sliding_window", 4096) is None:
            yield Problem("config.json: sliding_window", None, "must be a number: transformers takes no other", "state it")
            return
        flags = _windowed(model)
        # Without a window size every layer is rotated; with one that no layer has, none is.
        model.position.layer_pattern = None if all(flags) or hf_config.get("sliding_window", 4096) is None else flags

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        flags = _windowed(model)
        if self.windowless and not any(flags) and all(rotated_layers(model)):
            hf_config["sliding_window"] = None
        elif flags != rotated_layers(model):
            yield f"it rotates the layers with a window, here {flags}, not {rotated_layers(model)}"


def _windowed(model: Model) -> list[int]:
    return [int(arch.window_of_layer(model, layer) is not None) for layer in range(model.num_layers)]
