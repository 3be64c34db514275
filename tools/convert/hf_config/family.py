"""What describes a family of Hugging Face models: its config.json and its tensors, each in both directions.

A `Setting` ties keys of config.json to keys of the `model` section. It refuses, in either direction, what the other side can't
express. A `TensorRule` ties one canonical tensor to the tensors of the files that hold the same numbers, in one of several
forms.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from configs.errors import ConfigError, Problem
from configs.fields import walk
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.tensors.row_mappings import FusionRule, same

REQUIRED = object()
"""Default of a key that config.json must contain."""


@dataclass(frozen=True)
class UnsupportedModel(Problem):
    """The model is understood and its parameters can be counted, but a conversion would silently change its outputs."""


_RULES = {path: metadata["rule"] for path, _, metadata in walk(Model())}


def _dense_ffn(model: Model) -> int | None:
    """The width of dense MLPs; None where there are none and the model states none."""
    has_dense = model.moe.num_experts == 0 or not all(arch.moe_layers(model))
    return arch.ffn(model) if has_dense else model.ffn_hidden_size


_EFFECTIVE: dict[str, Callable[[Model], int | None]] = {
    "ffn_hidden_size": _dense_ffn, "moe.ffn_hidden_size": arch.expert_ffn,
}  # fmt: skip
"""Keys of the `model` section whose null means another key's value, and their value."""
_DEFAULTS = {path: value for path, value, _ in walk(Model())}


def wrong_value(hf_key: str, value: Any, model_key: str, kinds: tuple[type, ...] = (int,)) -> Problem | None:
    """The problem of a config.json value that `model.{model_key}` can't take, or None.

    `kinds`: allowed types. A bool is not an int here; an int is allowed where a float is.
    """
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        rule = "must be of type " + " or ".join(kind.__name__ for kind in kinds)
    elif broken := _RULES[model_key].broken_by(value):
        rule = f"must be {broken}: it sets model.{model_key}"
    else:
        return None
    return Problem(f"config.json: {hf_key}", value, rule, "mend the config.json")


def get(model: Model, path: str) -> Any:
    """The value of a dotted key of the `model` section."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


def put(model: Model, path: str, value: Any) -> None:
    """Set a dotted key of the `model` section."""
    *sections, name = path.split(".")
    owner: Any = model
    for section in sections:
        owner = getattr(owner, section)
    setattr(owner, name, value)


class Setting(Protocol):
    """One relation between config.json and the `model` section."""

    def names(self) -> tuple[str, ...]:
        """The keys of config.json that the setting reads."""
        ...

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        """Set the keys of `model` from config.json. Yields a problem for each value that can't be expressed."""
        ...

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        """Set the keys of config.json from `model`. Yields each reason why the family can't express the model."""
        ...


@runtime_checkable
class WithNote(Protocol):
    """A setting whose two sides mean the same by different values."""

    def note(self, hf_config: Mapping[str, Any], model: Model) -> str | None:
        """The note for a config.json and the `model` section that belongs to it; None when there is nothing to say."""
        ...


@dataclass(frozen=True)
class ConfigKey:
    """The same value under a key of config.json and a key of the `model` section.

    `also`: further keys of config.json with the same meaning. The first key present is read; all are written. `aliases`: such
    keys that transformers reads and doesn't write (attribute_map of the configuration class).
    """

    hf_key: str
    model_key: str
    default: Any = REQUIRED
    kind: type | tuple[type, ...] = int
    also: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        return (self.hf_key, *self.also, *self.aliases)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        stated = {name: hf_config[name] for name in self.names() if name in hf_config}
        value = next(iter(stated.values()), self.default)
        if any(other != value for other in stated.values()):
            rule = f"must agree: {stated} all mean model.{self.model_key}"
            yield Problem(f"config.json: {self.hf_key}", value, rule, "mend the config.json")
            return
        if value is None and _DEFAULTS[self.model_key] is not None:
            value = self.default
        if value is REQUIRED or (value is None and self.default is REQUIRED):
            yield Problem(
                f"config.json: {self.hf_key}", None, f"must be present: it sets model.{self.model_key}", "mend the config.json"
            )
            return
        kinds = self.kind if isinstance(self.kind, tuple) else (self.kind,)
        wrong = None if value is None else wrong_value(self.hf_key, value, self.model_key, kinds)
        if wrong:
            yield wrong
            return
        put(model, self.model_key, float(value) if kinds == (float,) and value is not None else value)

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        value = _EFFECTIVE.get(self.model_key, lambda model: get(model, self.model_key))(model)
        hf_config.update(dict.fromkeys((self.hf_key, *self.also), value))
        return iter(())


@dataclass(frozen=True)
class RepeatedKey:
    """A key of config.json that repeats another one. It is checked and written; transformers doesn't read it."""

    hf_key: str
    model_key: str

    def names(self) -> tuple[str, ...]:
        return (self.hf_key,)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        value, meant = hf_config.get(self.hf_key), get(model, self.model_key)
        if value is not None and value != meant:
            rule = f"must repeat model.{self.model_key} = {meant}, which transformers takes"
            yield Problem(f"config.json: {self.hf_key}", value, rule, "mend the config.json")

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config[self.hf_key] = get(model, self.model_key)
        return iter(())


@dataclass(frozen=True)
class AllowedValues:
    """A key of config.json with few values that Megatron-Core can build. The first value is written.

    An absent key means `absent` (default: the first value).
    """

    hf_key: str
    values: tuple[Any, ...]
    why: str
    absent: Any = REQUIRED

    def names(self) -> tuple[str, ...]:
        return (self.hf_key,)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        absent = self.values[0] if self.absent is REQUIRED else self.absent
        value = hf_config.get(self.hf_key, absent)
        # 0 == False in Python, and HF files write either.
        if value not in self.values:
            words = " or ".join(repr(item) for item in self.values)
            fix = "this model can't be converted; for planning: phalanx model config.json --to-yaml"
            yield UnsupportedModel(f"config.json: {self.hf_key}", value, f"must be {words}: {self.why}", fix)

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config |= {} if self.values[0] is None else {self.hf_key: self.values[0]}
        return iter(())


@dataclass(frozen=True)
class FixedValue:
    """A key of the `model` section that has the same value in every model of the family."""

    model_key: str
    value: Any

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        put(model, self.model_key, self.value)
        return iter(())

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        got = get(model, self.model_key)
        if got != self.value:
            yield f"model.{self.model_key} = {got!r}, it has {self.value!r} only"


@dataclass(frozen=True)
class TensorRule:
    """A canonical tensor, and the tensors of the files that hold its numbers. In names `{E}` is the expert; those of a layer
    begin with `model.layers.{L}.`.

    `scope`: the part of the model: model, layer, attention, delta, dense, moe, expert or mtp. `canonical_name`: the name inside
    the scope. `forms`: the ways in which files hold the tensor; an export writes the first one. `when`: whether a model has the
    tensor at all.
    """

    scope: str
    canonical_name: str
    forms: tuple[tuple[tuple[str, ...], FusionRule], ...]
    when: Callable[[Model], bool] = lambda model: True


def tensor_rule(
    scope: str, canonical_name: str, *hf_names: str,
    join: FusionRule = same, also: tuple[tuple[tuple[str, ...], FusionRule], ...] = (),
    when: Callable[[Model], bool] = lambda model: True,
) -> TensorRule:  # fmt: skip
    """A `TensorRule` that is written as `hf_names` and can also be read in the forms `also`."""
    return TensorRule(scope, canonical_name, ((hf_names, join), *also), when)


@dataclass(frozen=True)
class Family:
    """One family of models.

    `planning_only`: why its models can be counted but not built; such a family has no tensor rules.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    settings: tuple[Setting, ...]
    tensors: tuple[TensorRule, ...] = ()
    copies: Callable[[Model], dict[str, str]] = lambda model: {}
    """Tensors of the files that repeat another one: name -> name of the original. An import compares the two and keeps one."""
    planning_only: str | None = None
    ignored: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    """(start of names, what they are) of tensors that files may hold and an import leaves out with a note."""
    depth_prefix: str | None = None
    """Start of the names of a prediction depth's layer, of which there is one. None: depths count on after the last layer."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(start of names, start in its place) of tensors that a multimodal model's files hold under other names."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_model(self, hf_config: Mapping[str, Any]) -> tuple[Model, list[Problem]]:
        """The `model` section of a config.json, and a problem for everything that the section can't express."""
        model = Model(planning_only=self.planning_only or "")
        problems = [problem for setting in self.settings for problem in setting.read(hf_config, model)]
        return model, problems

    def to_hf_config(self, model: Model) -> dict[str, Any]:
        """The architecture keys of config.json. Raises ConfigError when the family can't express the model."""
        hf_config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_types[0]}
        reasons = [reason for setting in self.settings for reason in setting.write(model, hf_config)]
        if self.planning_only:
            reasons.append(self.planning_only)
        if reasons:
            rule = f"must be a model of the family {self.name}: {'; '.join(reasons)}"
            raise ConfigError(Problem("model", model.name, rule, "export it as another family (--family)"))
        return hf_config | dict(self.extra)

    def notes(self, hf_config: Mapping[str, Any], model: Model) -> list[str]:
        """What a user should know about a config.json and the `model` section that belongs to it."""
        found = [setting.note(hf_config, model) for setting in self.settings if isinstance(setting, WithNote)]
        return [note for note in found if note is not None]

    def known(self) -> set[str]:
        """The keys of config.json that the family understands."""
        return {name for setting in self.settings for name in setting.names()} | set(self.ignored)
