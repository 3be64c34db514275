"""Reading metrics.jsonl. In: the record of a run that lives or not. Out: its rows, from the start, from the end or near a step.

JSON has neither NaN nor infinity. Such a value is written as null, and the row's `nonfinite` names it: {"loss": "nan"}.

A record may have gigabytes. What is near its end or near a step is found without reading the rest.

Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from pretrain.run.files import iterate_lines, iterate_parts, last_row, lines_from_end, parse_line

# A search for a step ends so near to its row.
_NEAR_BYTES = 1 << 16
# So many lines are looked at for a row: the rest of one, and some that may be damaged.
_LOOKED_AT = 4
_STEP_TIME = re.compile(rb'"step_time_s": ?([0-9]{1,12}(?:\.[0-9]{1,20})?(?:e-[0-9]{1,2})?)')


def encode_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null in the place of NaN and infinity, and with their texts in `nonfinite`."""
    nonfinite = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**row, **dict.fromkeys(nonfinite), "nonfinite": nonfinite} if nonfinite else row


def decode_row(row: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `encode_row`."""
    if not isinstance(row.get("nonfinite"), dict):
        return row
    values = {key: float(text) for key, text in row["nonfinite"].items() if text in ("nan", "inf", "-inf")}
    return {key: values.get(key, value) for key, value in row.items() if key != "nonfinite"}


def is_row(row: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether an object of the record, or None, has a step."""
    return row is not None and isinstance(row.get("step"), int)


def read_rows(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Every complete row with a step, decoded, in file order from byte `start` on. Raises OSError."""
    for _, row in iterate_lines(path, start):
        if is_row(row):
            yield decode_row(row)


def rows_from_end(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete row with a step, decoded, the newest first. Only what is taken is read. Raises OSError."""
    for line in lines_from_end(path):
        row = parse_line(line)
        if is_row(row):
            yield decode_row(row)


def place_before(path: Path, step: int) -> int:
    """A byte of the record from which on all rows of this step and of later ones can be read, found by halving. Raises OSError.

    The first line from there on may be the rest of a line. Behind damage the place is earlier than it could be, never later.
    """
    low, high = 0, path.stat().st_size
    while step > 1 and high - low > _NEAR_BYTES:
        middle = (low + high) // 2
        rows = (row for _, row in islice(iterate_lines(path, middle), _LOOKED_AT) if is_row(row))
        found = next((row["step"] for row in rows), step)
        low, high = (middle, high) if found < step else (low, middle)
    return low


def steps_seconds(path: Path) -> float:
    """The sum of the step times of the record, in seconds: `steps_s` of its last row. 0: there is no such file. Raises OSError.

    Where the last row lacks it, or is damaged, the times are summed.
    """
    value = (last_row(path) or {}).get("steps_s")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    return sum_step_times(path)


def sum_step_times(path: Path) -> float:
    """The sum of `step_time_s` over the complete rows of a file of rows, in seconds. 0: there is no such file. Raises OSError.

    Rows are searched, not parsed.
    """
    try:
        return sum(sum(map(float, _STEP_TIME.findall(part))) for part in iterate_parts(path))
    except (FileNotFoundError, NotADirectoryError):
        return 0.0
