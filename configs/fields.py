"""How a section declares a key: default, meaning with its unit, and the values it takes. The rules live beside the key.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from configs.errors import Problem


@dataclass(frozen=True)
class KeyRule:
    """What a single key accepts, regardless of the others. `low` is inclusive, `above` is exclusive, `high` inclusive.

    NaN is never accepted. Infinity is accepted where `infinite` says so.
    """

    choices: tuple[str, ...] | None = None
    low: float | None = None
    above: float | None = None
    high: float | None = None
    infinite: bool = False

    def broken_by(self, value: Any) -> str | None:
        """The rule in words when `value` breaks it, else None. None (unset) always passes; a list passes item by item."""
        if value is None:
            return None
        if isinstance(value, list):
            return next((text for item in value if (text := self.broken_by(item))), None)
        if self.choices is not None and value not in self.choices:
            return "one of " + ", ".join(self.choices)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value != value:
                return "a number, not NaN"
            if abs(value) == math.inf and not self.infinite:
                return "a finite number"
            if self.low is not None and value < self.low:
                return f"at least {self.low:g}"
            if self.above is not None and value <= self.above:
                return f"more than {self.above:g}"
            if self.high is not None and value > self.high:
                return f"at most {self.high:g}"
        return None


def key(
    default: Any = MISSING,
    doc: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    infinite: bool = False,
) -> Any:
    """A dataclass field with its documentation and its rule."""
    metadata = {"doc": doc, "rule": KeyRule(choices, low, above, high, infinite)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every leaf key of a config: (dotted path, value, metadata), in declaration order."""
    for item in fields(section):
        value = getattr(section, item.name)
        path = f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from walk(value, path + ".")
        elif isinstance(value, list) and value and is_dataclass(value[0]):
            for index, part in enumerate(value):
                yield from walk(part, f"{path}[{index}].")
        else:
            yield path, value, dict(item.metadata)


def check_keys(config: Any) -> list[Problem]:
    """The problems of single keys: choices and ranges."""
    problems = []
    for path, value, metadata in walk(config):
        rule = metadata["rule"].broken_by(value) if "rule" in metadata else None
        if rule:
            problems.append(Problem(path, value, f"must be {rule}", f"set {path} to a value that is {rule}"))
    return problems
