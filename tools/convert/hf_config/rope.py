"""Rotary positions in config.json: the old keys (rope_theta, rope_scaling) and the new one (rope_parameters), in both directions.

Formulas: transformers' modeling_rope_utils and Megatron-Core's rotary embeddings. What Megatron-Core would rotate differently
is refused: rope types other than linear, llama3 and yarn, and attention factors below YaRN's minimum.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model, RopeScaling
from parallel import architecture as arch
from tools.convert.hf_config.family import UnsupportedModel, wrong_value

KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_DIGITS = 10
"""Decimals of an mscale that is computed from attention_factor. Rounding makes a round trip give the same value."""
_ORIGINAL = "original_max_position_embeddings"
# Key of config.json -> key of position.scaling, for each kind; all kinds have `factor`, too.
_NUMBERS = {
    "linear": {},
    "llama3": {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"},
}


def yarn_mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature 0.1 weight ln(factor) + 1 (arXiv 2309.00071, eq. 22; the weight is DeepSeek's)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """The keys of rotary positions.

    `theta`, `fraction`: values of absent keys in this family; without a `fraction` the family rotates whole heads. `stated`:
    the rope type must be present. `interleaved`: the family rotates neighbouring dims as pairs. `kinds`: the rope types that
    transformers takes for the family and megatron-core can build.
    """

    theta: float = 10000.0
    fraction: float | None = None
    stated: bool = False
    interleaved: bool = False
    kinds: tuple[str, ...] = tuple(KINDS)

    def names(self) -> tuple[str, ...]:
        return ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", _ORIGINAL)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        new, old = hf_config.get("rope_parameters") or {}, hf_config.get("rope_scaling") or {}
        if not isinstance(new, Mapping) or not isinstance(old, Mapping) or any(isinstance(v, Mapping) for v in new.values()):
            rule = "must be one mapping: different frequencies per layer can't be built"
            yield Problem("config.json: rope_parameters", new or old, rule, "convert another model")
            return
        if self.stated and not new and not old:
            rule = "must be stated: without it transformers 5 takes this family's yarn, transformers 4 no scaling"
            yield UnsupportedModel("config.json: rope_scaling", None, rule, 'state it, {"rope_type": "default"} for none')
            return
        yield from _disagreements(new, old, hf_config)
        values = {name: value for name, value in {**hf_config, **old, **new}.items() if value is not None}
        theta = values.get("rope_theta", None if "rope_theta" in hf_config else self.theta)
        fraction = values.get("partial_rotary_factor", self.fraction or 1.0)
        wrong = wrong_value("rope_theta", theta, "position.theta", (float,))
        wrong = wrong or wrong_value("partial_rotary_factor", fraction, "position.rotary_fraction", (float,))
        if wrong:
            yield wrong
            return
        model.position.kind, model.position.interleaved = "rope", self.interleaved
        model.position.theta, model.position.rotary_fraction = float(theta), float(fraction)
        if self.fraction is None and fraction != 1.0:
            rule = "must be 1: transformers does not read it for this family"
            yield Problem("config.json: partial_rotary_factor", fraction, rule, "mend the config.json")
        kind = _kind(new) or _kind(old) or "default"
        if kind not in self.kinds:
            rule = f"must be {' or '.join(self.kinds)}: megatron-core can build no other that transformers takes for this family"
            yield UnsupportedModel("config.json: rope type", kind, rule, "convert another model")
        elif kind != "default":
            yield from _read_scaling(KINDS[kind], values, model)

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        position = model.position
        if position.kind != "rope" or position.interleaved != self.interleaved:
            how = "neighbouring dims" if self.interleaved else "halves"
            yield f"model.position.kind = {position.kind}, interleaved = {position.interleaved}: it rotates {how}"
            return
        if self.fraction is None and position.rotary_fraction != 1.0:
            yield f"model.position.rotary_fraction = {position.rotary_fraction}, it has 1 only"
        inner = _write_scaling(position.scaling)
        if inner["rope_type"] not in self.kinds:
            yield f"its rope type is {' or '.join(self.kinds)}, not {inner['rope_type']}"
        partial = {} if self.fraction is None else {"partial_rotary_factor": position.rotary_fraction}
        hf_config["rope_parameters"] = {"rope_theta": position.theta, **inner, **partial}
        # transformers 4, vLLM, SGLang and llama.cpp read only these keys.
        hf_config["rope_theta"] = position.theta
        legacy = {**inner, "type": inner["rope_type"]}
        hf_config["rope_scaling"] = None if position.scaling.kind == "none" else legacy
        hf_config.update(partial)


@dataclass(frozen=True)
class RotaryDim:
    """rotary_dim, the rotated width of a head (MiniMax-M2), in place of partial_rotary_factor. Must follow `Rope`."""

    def names(self) -> tuple[str, ...]:
        return ("rotary_dim",)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        width, head = hf_config.get("rotary_dim"), arch.head_dim(model)
        if width is None:
            return
        stated = "partial_rotary_factor" in {**hf_config, **(hf_config.get("rope_parameters") or {})}
        if type(width) is not int or not 0 < width <= head or (stated and width != model.position.rotary_fraction * head):
            rule = f"must be the rotated part of head_dim = {head}, partial_rotary_factor of it where that is stated"
            yield Problem("config.json: rotary_dim", width, rule, "mend the config.json")
            return
        model.position.rotary_fraction = width / head

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config["rotary_dim"] = int(model.position.rotary_fraction * arch.head_dim(model))
        return iter(())


def _kind(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type") or scaling.get("type")


def _disagreements(new: Mapping[str, Any], old: Mapping[str, Any], hf_config: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each value on which rope_parameters, rope_scaling and the top-level keys disagree. Readers differ in which of
    them they use.
    """
    beside = {name: hf_config[name] for name in ("rope_theta", "partial_rotary_factor", _ORIGINAL) if name in hf_config}
    places = [{**place, "rope type": _kind(place)} for place in (new, old, beside)]
    for name in sorted({name for place in places for name in place} - {"rope_type", "type"}):
        said = [place[name] for place in places if place.get(name) is not None]
        if any(value != said[0] for value in said):
            rule = f"must agree: rope_parameters, rope_scaling and the keys beside them say {' and '.join(map(repr, said))}"
            yield Problem(f"config.json: {name}", said[-1], rule, "mend the config.json")
        elif old and new.get(name) is not None and name in new and places[1].get(name) is None and name not in beside:
            rule = "must be in rope_scaling too, or beside it: transformers reads that one alone where both are there"
            yield Problem(f"config.json: rope_parameters: {name}", new[name], rule, "leave rope_scaling out, or state it there")


def _read_scaling(kind: str, values: Mapping[str, Any], model: Model) -> Iterator[Problem]:
    scaling = model.position.scaling
    scaling.kind = kind
    if not values.get("factor"):
        rule = f"must be present: rope type {kind} scales positions by it"
        yield Problem("config.json: rope factor", None, rule, "mend the config.json")
        return
    for hf_key, model_key in {"factor": "factor", **_NUMBERS[kind]}.items():
        value = values.get(hf_key)
        wrong = wrong_value(f"rope {hf_key}", value, f"position.scaling.{model_key}", (float,)) if value else None
        if wrong:
            yield wrong
            return
        # transformers also replaces 0 by its default.
        if value:
            setattr(scaling, model_key, float(value))
    if kind == "linear":
        return
    original: Any = values.get(_ORIGINAL) or values.get("max_position_embeddings")
    wrong = wrong_value(_ORIGINAL, original, "position.scaling.original_max_position")
    if wrong:
        yield wrong
        return
    scaling.original_max_position = original
    if kind == "yarn":
        yield from _read_yarn(values, model)


def _read_yarn(values: Mapping[str, Any], model: Model) -> Iterator[Problem]:
    scaling = model.position.scaling
    truncate, stated = values.get("truncate", True), values.get("attention_factor")
    if not isinstance(truncate, bool):
        yield Problem("config.json: rope truncate", truncate, "must be of type bool", "mend the config.json")
        return
    scaling.truncate = truncate
    if not scaling.truncate and arch.is_mla(model):
        rule = "must be true with latent attention: megatron-core rounds the correction range there"
        yield UnsupportedModel("config.json: rope truncate", False, rule, "convert another model")
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, (int, float)) or not math.isfinite(stated)):
        yield Problem("config.json: attention_factor", stated, "must be of type float", "mend the config.json")
        return
    # transformers scales cosines and sines by attention_factor. Without it, by the ratio of the mscales of mscale and
    # mscale_all_dim when both are present and not 0, else as with mscale = 1. With latent attention it also scales the
    # softmax by mscale_all_dim.
    has_both = bool(values.get("mscale") and values.get("mscale_all_dim"))
    if not has_both:
        scaling.mscale = 1.0
        scaling.mscale_all_dim = scaling.mscale_all_dim if arch.is_mla(model) and values.get("mscale_all_dim") else 0.0
    if stated is None and (has_both or not scaling.mscale_all_dim):
        return
    over_all = yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    factor = stated if stated is not None else yarn_mscale(scaling.factor, 1.0)
    if abs(yarn_mscale(scaling.factor, scaling.mscale) / over_all - factor) <= 1e-6:
        return
    mscale = (factor * over_all - 1.0) / (0.1 * math.log(scaling.factor)) if scaling.factor > 1 else -1.0
    if mscale < 0:
        rule = f"must be at least {1 / over_all:.6g}, and 1 when factor is 1: megatron-core can build no other"
        yield UnsupportedModel("config.json: attention_factor", factor, rule, "convert another model")
        return
    scaling.mscale = round(mscale, _DIGITS)


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "none":
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    values |= {hf_key: getattr(scaling, model_key) for hf_key, model_key in _NUMBERS[scaling.kind].items()}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "yarn":
        values["truncate"] = scaling.truncate
        if not (scaling.mscale and scaling.mscale_all_dim):
            # transformers reads mscale and mscale_all_dim only together. The effect of one alone is written as attention_factor.
            del values["mscale"], values["mscale_all_dim"]
            over_all = yarn_mscale(scaling.factor, scaling.mscale_all_dim)
            if scaling.mscale != 1.0 or scaling.mscale_all_dim:
                values["attention_factor"] = yarn_mscale(scaling.factor, scaling.mscale) / over_all
            values |= {"mscale_all_dim": scaling.mscale_all_dim} if scaling.mscale_all_dim else {}
    return values
