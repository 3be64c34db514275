"""What a family of Hugging Face models is made of: a two-way description of its config.json and of its tensors.

A `Setting` ties config.json to the `model` section in both directions; what a family can't express is refused in both.
A `Tensor` ties one canonical tensor to the tensors of the files that hold the same numbers, in any of several forms.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from configs.errors import ConfigError, Problem
from configs.fields import walk
from configs.model_schema import Model
from tools.convert.tensors.spans import Join, same

REQUIRED = object()
"""Default of a key that config.json must state."""


@dataclass(frozen=True)
class Refusal(Problem):
    """The model is understood and can be counted, but converting it would silently change its answers."""


_RULES = {path: metadata["rule"] for path, _, metadata in walk(Model())}
_DEFAULTS = {path: value for path, value, _ in walk(Model())}


def wrong_value(theirs: str, value: Any, ours: str, kinds: tuple[type, ...] = (int,)) -> Problem | None:
    """What keeps a value of config.json out of `model.ours`: its type (bool is no int, an int is a float), or its range."""
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        rule = "must be of type " + " or ".join(kind.__name__ for kind in kinds)
    elif broken := _RULES[ours].broken_by(value):
        rule = f"must be {broken}: it is model.{ours}"
    else:
        return None
    return Problem(f"config.json: {theirs}", value, rule, "mend the config.json")


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
        """The keys of config.json that it reads."""
        ...

    def read(self, theirs: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        """Set what config.json says; yields what can't be expressed."""
        ...

    def write(self, model: Model, theirs: dict[str, Any]) -> Iterator[str]:
        """State it in config.json; yields why this family can't hold the model."""
        ...


@dataclass(frozen=True)
class Key:
    """The same value under two names. `also`: further names in config.json; the first one present is read, all are written."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    kind: type | tuple[type, ...] = int
    also: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        return (self.theirs, *self.also)

    def read(self, theirs: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        stated = {name: theirs[name] for name in self.names() if name in theirs}
        value = next(iter(stated.values()), self.default)
        if any(other != value for other in stated.values()):
            rule = f"must agree: {stated} all mean model.{self.ours}"
            yield Problem(f"config.json: {self.theirs}", value, rule, "mend the config.json")
            return
        if value is None and _DEFAULTS[self.ours] is not None:
            value = self.default
        if value is REQUIRED or (value is None and self.default is REQUIRED):
            yield Problem(f"config.json: {self.theirs}", None, f"must be there: it is model.{self.ours}", "mend the config.json")
            return
        kinds = self.kind if isinstance(self.kind, tuple) else (self.kind,)
        wrong = None if value is None else wrong_value(self.theirs, value, self.ours, kinds)
        if wrong:
            yield wrong
            return
        put(model, self.ours, float(value) if kinds == (float,) and value is not None else value)

    def write(self, model: Model, theirs: dict[str, Any]) -> Iterator[str]:
        theirs.update(dict.fromkeys(self.names(), get(model, self.ours)))
        return iter(())


@dataclass(frozen=True)
class Echo:
    """A key of config.json that repeats another one. It is written, and checked, but transformers does not read it."""

    theirs: str
    ours: str

    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        value, meant = theirs.get(self.theirs), get(model, self.ours)
        if value is not None and value != meant:
            rule = f"must repeat model.{self.ours} = {meant}, which transformers takes"
            yield Problem(f"config.json: {self.theirs}", value, rule, "mend the config.json")

    def write(self, model: Model, theirs: dict[str, Any]) -> Iterator[str]:
        theirs[self.theirs] = get(model, self.ours)
        return iter(())


@dataclass(frozen=True)
class Only:
    """A key of config.json with one meaning that can be kept. An absent key means `absent` (default: the first value)."""

    theirs: str
    values: tuple[Any, ...]
    why: str
    absent: Any = REQUIRED

    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        absent = self.values[0] if self.absent is REQUIRED else self.absent
        value = theirs.get(self.theirs, absent)
        # 0 == False in Python, and HF files write either.
        if value not in self.values:
            words = " or ".join(repr(item) for item in self.values)
            fix = "this model can't be converted; for planning: phalanx model config.json --to-yaml"
            yield Refusal(f"config.json: {self.theirs}", value, f"must be {words}: {self.why}", fix)

    def write(self, model: Model, theirs: dict[str, Any]) -> Iterator[str]:
        theirs |= {} if self.values[0] is None else {self.theirs: self.values[0]}
        return iter(())


@dataclass(frozen=True)
class Always:
    """A key of the `model` section that every model of the family has at this value."""

    ours: str
    value: Any

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, theirs: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        put(model, self.ours, self.value)
        return iter(())

    def write(self, model: Model, theirs: dict[str, Any]) -> Iterator[str]:
        got = get(model, self.ours)
        if got != self.value:
            yield f"model.{self.ours} = {got!r}, it has {self.value!r} only"


@dataclass(frozen=True)
class Tensor:
    """A canonical tensor and the tensors that hold its numbers. `{L}` layer, `{E}` expert in their names.

    `ours` is the name inside the scope (model, layer, dense, moe, expert, mtp); `forms` are the ways in which files hold it,
    the first is the one written; `when`: whether the model has it at all.
    """

    scope: str
    ours: str
    forms: tuple[tuple[tuple[str, ...], Join], ...]
    when: Callable[[Model], bool] = lambda model: True


def tensor(
    scope: str, ours: str, *theirs: str, join: Join = same, also: tuple[tuple[tuple[str, ...], Join], ...] = (),
    when: Callable[[Model], bool] = lambda model: True,
) -> Tensor:  # fmt: skip
    """A `Tensor` written as `theirs` and read from `also`, too."""
    return Tensor(scope, ours, ((theirs, join), *also), when)


@dataclass(frozen=True)
class Family:
    """`planning_only`: why its models can be counted but not built here; it then has no tensors."""

    name: str
    model_types: tuple[str, ...]
    architecture: str
    settings: tuple[Setting, ...]
    tensors: tuple[Tensor, ...] = ()
    copies: Callable[[Model], dict[str, str]] = lambda model: {}
    """Tensors of the files that must equal another one: name -> name of the original. Read, compared, not kept."""
    planning_only: str | None = None
    ignored: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_model(self, theirs: Mapping[str, Any]) -> tuple[Model, list[Problem]]:
        """The `model` section of a config.json and everything that it can't say."""
        model = Model(planning_only=self.planning_only or "")
        problems = [problem for setting in self.settings for problem in setting.read(theirs, model)]
        return model, problems

    def to_theirs(self, model: Model) -> dict[str, Any]:
        """config.json's architecture keys. Raises ConfigError when the family can't hold the model."""
        theirs: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_types[0]}
        reasons = [reason for setting in self.settings for reason in setting.write(model, theirs)]
        if self.planning_only:
            reasons.append(self.planning_only)
        if reasons:
            rule = f"must be a model of the family {self.name}: {'; '.join(reasons)}"
            raise ConfigError(Problem("model", model.name, rule, "export it as another family (--family)"))
        return theirs | dict(self.extra)

    def known(self) -> set[str]:
        """Keys of config.json that it understands."""
        return {name for setting in self.settings for name in setting.names()} | set(self.ignored)
