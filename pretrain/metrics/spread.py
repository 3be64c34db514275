"""Evenly spread indices, for metrics of some layers of many.

Torch-free.
"""

from __future__ import annotations


def spread(count: int, shown: int) -> list[int]:
    """At most `shown` of `count` indices, evenly spread. For two or more they include the first and the last."""
    if shown >= count:
        return list(range(count))
    if shown <= 1:
        return [0][:shown]
    return sorted({round(i * (count - 1) / (shown - 1)) for i in range(shown)})
