"""The result of one check: a level, the value found, the rule and the fix.

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
    """`name` is the check, `value` what it found, `expected` the rule with its numbers, `fix` the advice (empty at level ok)."""

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


def level_of(fails: bool, warns: bool) -> str:
    """`fail` if it fails, else `warn` if it warns, else `ok`."""
    if fails:
        return FAIL
    return WARN if warns else OK


def graded(name: str, level: str, value: str, expected: str, fix: str) -> Finding:
    """A finding. Its fix is left out at level ok."""
    return Finding(name, level, value, expected, fix if level != OK else "")
