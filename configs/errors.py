"""Problems a user can mend. A check returns a list of `Problem`; a command prints them all and exits 2.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (dotted key, or file), what was got, the rule with its numbers, what to change."""

    path: str
    got: Any
    rule: str
    fix: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Notice:
    """Something legal that the user should know: where, and what it means or costs."""

    path: str
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class ConfigError(Exception):
    """Bad input, with every problem found. Commands print `report(problems)` and exit 2, without a traceback."""

    def __init__(self, problems: Sequence[Problem] | Problem) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(report(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem]]]:
        return (type(self), (self.problems,))


class DiskError(ConfigError):
    """What a disk refused to a run. No input is bad: once the disk has room or is repaired, the same start succeeds.

    A rank exits with 1, so that the run is started again where the config allows it.
    """


def json_problem(problem: Problem) -> dict[str, Any]:
    """A problem as strict JSON takes it: what isn't a JSON value (NaN, infinity, bytes) becomes its text."""
    return problem.as_dict() | {"got": json_value(problem.got)}


def json_value(value: Any) -> Any:
    """The value as strict JSON takes it: NaN, infinity and what JSON doesn't know become their texts."""
    if isinstance(value, dict):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return value if value is None or isinstance(value, (bool, int, str)) else repr(value)


def report(problems: Sequence[Problem]) -> str:
    """The text that people read: one block a problem, in the order found."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    blocks = [f"  {p.path} = {p.got!r}\n      rule: {p.rule}\n      fix:  {p.fix}" for p in problems]
    return "\n".join([count + ":", *blocks])
