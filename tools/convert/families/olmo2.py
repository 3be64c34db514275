"""OLMo-2 and OLMo-3 (arXiv 2501.00656, 2512.13961): norms after attention and MLP, q/k norms over all heads; OLMo-3 has windows.

Source: transformers models/olmo2 and olmo3.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from tools.convert.families.exaone_moe import by_pattern
from tools.convert.hf_config import settings
from tools.convert.hf_config.family import AllowedValues, Family, Setting, UnsupportedModel
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.windows import Windows
from tools.convert.tensors import shared_rules as tensors

_ROPE = Rope(theta=500000.0)
_FULL, _WINDOW = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class RopeByLayer:
    """rope_parameters of both kinds of layers. Those with a window have no scaling. Must follow `Windows`.

    rope_theta and rope_scaling, the older keys, are those of the layers without a window; transformers 5 gives the others
    theta = 500000 then.
    """

    def names(self) -> tuple[str, ...]:
        return _ROPE.names()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        new, old = hf_config.get("rope_parameters") or {}, hf_config.get("rope_scaling") or {}
        kinds: list[Any] = [new.get(_FULL) or {}, new.get(_WINDOW) or {}] if isinstance(new, Mapping) else [None]
        if not isinstance(old, Mapping) or not all(isinstance(kind, Mapping) for kind in kinds) or set(new) - {_FULL, _WINDOW}:
            rule = f"must be a mapping of {_FULL} and {_WINDOW}, each a mapping"
            yield Problem("config.json: rope_parameters", new, rule, "mend the config.json")
            return
        full, window = kinds
        stated = hf_config.get("rope_theta") or _ROPE.theta
        full = {"rope_type": "default", "rope_theta": stated, **full, **old}
        window = {"rope_type": "default", "rope_theta": _ROPE.theta, **window}
        if window != {"rope_type": "default", "rope_theta": full["rope_theta"]}:
            rule = f"must have no scaling, and the rope_theta = {full['rope_theta']} of {_FULL}: other bases can't be built"
            yield UnsupportedModel(f"config.json: rope_parameters: {_WINDOW}", window, rule, "convert another model")
        others = {name: value for name, value in hf_config.items() if name not in ("rope_theta", "rope_scaling")}
        yield from _ROPE.read(others | {"rope_parameters": full}, model)
        if not model.position.scaling.truncate:
            rule = "must be true: transformers doesn't read it where rope_parameters has both kinds of layers"
            yield UnsupportedModel(f"config.json: rope_parameters: {_FULL}: truncate", False, rule, "convert another model")
        if model.position.scaling.kind != "none" and model.attention.window_size_tokens is not None:
            model.position.scaling.layers = _FULL

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        yield from _ROPE.write(model, hf_config)
        scaling = model.position.scaling
        if scaling.kind != "none" and scaling.layers == "all" and model.attention.window_size_tokens is not None:
            yield "its layers with a window have no scaled frequencies"
        if scaling.kind == "yarn" and not scaling.truncate:
            yield "its correction range has whole numbers (truncate)"
        window = {"rope_type": "default", "rope_theta": model.position.theta}
        hf_config["rope_parameters"] = {_FULL: hf_config.get("rope_parameters"), _WINDOW: window}


def _olmo(name: str, architecture: str, attention: tuple[Setting, ...], *decided: str) -> Family:
    """`attention`: the settings of positions and windows, which set the keys `decided`."""
    return Family(
        name=name,
        model_types=(name,),
        architecture=architecture,
        settings=(
            *settings.decoder(1e-5, settings.KeyValueHeads(None), norm_position="after"),
            settings.PLAIN_MLP,
            settings.HeadDim(),
            *attention,
            AllowedValues("attention_bias", (False, None), "its output bias has no counterpart here"),
            *settings.plain_attention(*decided, **{"attention.qk_norm": True, "attention.qk_norm_span": "all_heads"}),
            settings.NoExperts(),
        ),
        tensors=(*tensors.EMBEDDING, *tensors.attention(norms=tensors.POST_NORMS), *tensors.DENSE_MLP),
    )


OLMO2 = _olmo("olmo2", "Olmo2ForCausalLM", (Rope(),))
OLMO3 = _olmo(
    "olmo3", "Olmo3ForCausalLM", (Windows(by_pattern, switch=False), RopeByLayer()),
    "attention.window_size_tokens", "position.scaling.layers",
)  # fmt: skip
