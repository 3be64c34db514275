"""Rotary positions in config.json, old keys (rope_theta, rope_scaling) and new (rope_parameters), in both directions. [p]

Formulas on both sides: transformers' modeling_rope_utils and megatron-core's rotary embeddings. What megatron-core would
turn differently is refused: other kinds than linear, llama3 and yarn, an explicit attention factor of another value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model, RopeScaling
from parallel import architecture as arch
from tools.convert.family import REQUIRED, Refusal

KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
# config.json's key -> ours, for each kind beside `factor`.
_NUMBERS = {
    "linear": {},
    "llama3": {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"},
}


def yarn_mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, eq. 22, with DeepSeek's weight)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """`theta`, `fraction`: what an absent key means in this family."""

    theta: Any = 10000.0
    fraction: float | None = None

    def names(self) -> tuple[str, ...]:
        return ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")

    def read(self, theirs: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        new, old = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
        if not isinstance(new, Mapping) or not isinstance(old, Mapping) or any(isinstance(v, Mapping) for v in new.values()):
            rule = "must be one mapping: other frequencies for other layers can't be built"
            yield Problem("config.json: rope_parameters", new or old, rule, "convert another model")
            return
        yield from _disagreements(new, old, theirs)
        values = {**theirs, **old, **new}
        theta = values.get("rope_theta", self.theta)
        if theta is REQUIRED or isinstance(theta, bool) or not isinstance(theta, (int, float)):
            got = None if theta is REQUIRED else theta
            yield Problem("config.json: rope_theta", got, "must be there, a number", "mend the config.json")
            return
        model.position.kind = "rope"
        model.position.theta = float(theta)
        fraction = values.get("partial_rotary_factor", self.fraction if self.fraction is not None else 1.0)
        if self.fraction is None and fraction != 1.0:
            rule = "must be 1: transformers does not read it for this family"
            yield Problem("config.json: partial_rotary_factor", fraction, rule, "mend the config.json")
        model.position.rotary_fraction = float(fraction)
        kind = new.get("rope_type") or new.get("type") or old.get("rope_type") or old.get("type") or "default"
        if kind not in KINDS:
            rule = "must be default, linear, llama3 or yarn: megatron-core has no other"
            yield Refusal("config.json: rope type", kind, rule, "convert another model")
        elif kind != "default":
            yield from _read_scaling(KINDS[kind], values, model)

    def write(self, model: Model, theirs: dict[str, Any]) -> Iterator[str]:
        position = model.position
        if position.kind != "rope" or position.interleaved:
            yield f"model.position.kind = {position.kind}, interleaved = {position.interleaved}: it rotates halves"
            return
        if self.fraction is None and position.rotary_fraction != 1.0:
            yield f"model.position.rotary_fraction = {position.rotary_fraction}, it has 1 only"
        inner = _write_scaling(position.scaling)
        partial = {} if self.fraction is None else {"partial_rotary_factor": position.rotary_fraction}
        theirs["rope_parameters"] = {"rope_theta": position.theta, **inner, **partial}
        # Readers older than transformers 5, and vLLM, SGLang, llama.cpp, know these only.
        theirs["rope_theta"] = position.theta
        legacy = {**inner, "type": inner["rope_type"]}
        theirs["rope_scaling"] = None if position.scaling.kind == "none" else legacy
        theirs.update(partial)


def _disagreements(new: Mapping[str, Any], old: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Problem]:
    pairs = [(name, new[name], old[name]) for name in new if name in old]
    pairs += [
        (name, new[name], theirs[name]) for name in ("rope_theta", "partial_rotary_factor") if name in new and name in theirs
    ]
    for name, first, second in pairs:
        if first != second:
            rule = f"must agree: rope_parameters says {first!r}, the older key {second!r}"
            yield Problem(f"config.json: {name}", second, rule, "mend the config.json")


def _read_scaling(kind: str, values: Mapping[str, Any], model: Model) -> Iterator[Problem]:
    scaling = model.position.scaling
    scaling.kind = kind
    for theirs, ours in {"factor": "factor", **_NUMBERS[kind]}.items():
        value = values.get(theirs)
        if value is None and theirs == "factor":
            yield Problem(
                "config.json: rope factor", None, f"must be there: rope type {kind} stretches by it", "mend the config.json"
            )
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            yield Problem(f"config.json: rope {theirs}", value, "must be a number", "mend the config.json")
            return
        elif value is not None:
            setattr(scaling, ours, float(value))
    if kind == "linear":
        return
    original = values.get("original_max_position_embeddings") or values.get("max_position_embeddings")
    if not isinstance(original, int):
        yield Problem(
            "config.json: original_max_position_embeddings", original, "must be a number of tokens", "mend the config.json"
        )
        return
    scaling.original_max_position = original
    if kind == "yarn":
        yield from _read_yarn(values, model)


def _read_yarn(values: Mapping[str, Any], model: Model) -> Iterator[Problem]:
    scaling = model.position.scaling
    # transformers takes the ratio of the two only when both are there and not 0, else the temperature of mscale = 1.
    if not (values.get("mscale") and values.get("mscale_all_dim")):
        if values.get("mscale_all_dim") and arch.is_mla(model):
            rule = "must come with mscale: alone it would scale the softmax but not the frequencies"
            yield Refusal("config.json: mscale_all_dim", values["mscale_all_dim"], rule, "state both")
        scaling.mscale, scaling.mscale_all_dim = 1.0, 0.0
    scaling.truncate = bool(values.get("truncate", True))
    if not scaling.truncate and arch.is_mla(model):
        rule = "must be true with latent attention: megatron-core rounds the correction range there"
        yield Refusal("config.json: rope truncate", False, rule, "convert another model")
    computed = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    stated = values.get("attention_factor")
    if stated is not None and abs(stated - computed) > 1e-6:
        rule = f"must be {computed:.6g}, which follows from factor and mscale: megatron-core has no other"
        yield Refusal("config.json: attention_factor", stated, rule, "convert another model")


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "none":
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    values |= {theirs: getattr(scaling, ours) for theirs, ours in _NUMBERS[scaling.kind].items()}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "yarn":
        if scaling.mscale_all_dim == 0.0:
            # Both or none: transformers reads the pair.
            del values["mscale"], values["mscale_all_dim"]
        values["truncate"] = scaling.truncate
    return values
