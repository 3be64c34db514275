"""attention_bias and mlp_bias of config.json. Megatron-Core has one switch for the biases of all linear layers.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from tools.convert.hf_config.family import UnsupportedModel, get, put

BIASES = ("attention.qkv_bias", "attention.output_bias", "mlp_bias")
"""Keys of the `model` section that the setting decides."""


@dataclass(frozen=True)
class Biases:
    """Biases in all linear layers, or in none.

    `mlp`: the family has the key mlp_bias. Without it the family's MLPs and experts have no biases.
    """

    mlp: bool = False

    def names(self) -> tuple[str, ...]:
        return ("attention_bias", "mlp_bias")[: 2 if self.mlp else 1]

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        attention, mlp = hf_config.get("attention_bias") or False, (self.mlp and hf_config.get("mlp_bias")) or False
        for name, value in (("attention_bias", attention), ("mlp_bias", mlp)):
            if not isinstance(value, bool):
                yield Problem(f"config.json: {name}", value, "must be of type bool", "mend the config.json")
                return
        # The values are set even when they differ: such a model can't be built, but its parameters are counted correctly.
        for key, value in zip(BIASES, (attention, attention, mlp)):
            put(model, key, value)
        if attention != mlp:
            inner = f"mlp_bias = {mlp}" if self.mlp else "False, as its MLPs have none"
            rule = f"must equal {inner}: megatron-core has one switch for the biases of all linear layers"
            yield UnsupportedModel("config.json: attention_bias", attention, rule, "convert another model")

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config |= dict.fromkeys(self.names(), model.mlp_bias)
        if len({get(model, key) for key in BIASES}) > 1 or (model.mlp_bias and not self.mlp):
            yield "its linear layers all have biases, or none has" if self.mlp else "it has no biases"
