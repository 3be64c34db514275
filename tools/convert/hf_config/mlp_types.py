"""mlp_layer_types of config.json: which layers are MoE layers, one word a layer, with first_k_dense_replace as its short form.

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

_TYPES = ("dense", "sparse")
_WORDS, _COUNT = "mlp_layer_types", "first_k_dense_replace"


def put_moe_layers(model: Model, flags: list[int]) -> None:
    """Set the MoE layers, 1 for each, in the shortest way."""
    dense = flags.index(1) if any(flags) else len(flags)
    if all(flags[dense:]):
        model.moe.first_dense_layers = dense
    else:
        model.moe.layer_pattern = flags


@dataclass(frozen=True)
class MlpLayerTypes:
    """`dense`: the number of dense layers at the bottom where both keys are absent.

    `counted`: transformers reads first_k_dense_replace, too, where mlp_layer_types is absent.
    """

    dense: int
    counted: bool = False

    def names(self) -> tuple[str, ...]:
        return (_WORDS, _COUNT)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        types, count = hf_config.get(_WORDS), hf_config.get(_COUNT)
        if count is not None and (wrong := wrong_value(_COUNT, count, "moe.first_dense_layers")):
            yield wrong
            return
        if types is None:
            if count not in (None, self.dense) and not self.counted:
                rule = f"must be {self.dense}: without {_WORDS} transformers takes that number"
                yield Problem(f"config.json: {_COUNT}", count, rule, f"state {_WORDS}")
            model.moe.first_dense_layers = self.dense if count is None else count
            return
        if not isinstance(types, list) or len(types) != model.num_layers or any(kind not in _TYPES for kind in types):
            rule = f"must be {' or '.join(_TYPES)} for each of the {model.num_layers} layers"
            yield Problem(f"config.json: {_WORDS}", types, rule, "mend the config.json")
            return
        if count is not None and types != [_TYPES[layer >= count] for layer in range(model.num_layers)]:
            rule = f"must agree with {_WORDS} = {types}: readers differ in which of the two they use"
            yield Problem(f"config.json: {_COUNT}", count, rule, "mend the config.json")
            return
        put_moe_layers(model, [_TYPES.index(kind) for kind in types])

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        flags = [int(is_moe) for is_moe in arch.moe_layers(model)]
        if not any(flags):
            yield "it has experts"
        hf_config[_WORDS] = [_TYPES[flag] for flag in flags]
        dense = flags.index(1) if any(flags) else len(flags)
        if all(flags[dense:]):
            hf_config[_COUNT] = dense
