"""Numbers as people read them. In: a count or seconds. Out: short text.

Torch-free.
"""

from __future__ import annotations

import re


def count(value: float) -> str:
    """1234 → 1.23k: three digits, whatever the size."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """12:34, 1:02:03 or 4d 05h; None is unknown."""
    if seconds is None:
        return "?"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest_s:02d}" if hours else f"{minutes}:{rest_s:02d}"


def seconds_of(time: str | None) -> int | None:
    """A time limit as sbatch takes it (minutes, minutes:seconds, hours:minutes:seconds, days-hours…); None: no number."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?", time or "")
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units))
