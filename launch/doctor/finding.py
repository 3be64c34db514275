"""What a check found. Pure values.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
_LEVELS = (OK, WARN, FAIL)


@dataclass(frozen=True)
class Finding:
    """`name`: the check. `value` was found, `expected` is the rule with its number, `fix` says what to do (empty when ok)."""

    name: str
    level: str
    value: str
    expected: str = ""
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> str:
    """The verdict over several findings."""
    return max((finding.level for finding in findings), key=_LEVELS.index, default=OK)


def graded(name: str, level: str, value: str, expected: str, fix: str) -> Finding:
    """A finding whose fix is left out when nothing is wrong."""
    return Finding(name, level, value, expected, fix if level != OK else "")
