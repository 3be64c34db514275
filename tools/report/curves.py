"""The record as curves that a page can hold. In: rows of metrics.jsonl, part by part. Out: points, by name of a number.

Steps are gathered in buckets of equal length. A bucket keeps the smallest and the largest value of each number with their steps,
and the mean, so that no spike is lost. While every bucket has one step, all values are there. When there are too many buckets,
their length doubles: the memory depends on the number of names only, not on the number of rows.

A value that is null, no number or not finite is left out. Steps that are not ascending are left out and counted.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]

MOST_NAMES = 160
# While rows come in; at the end `points` merges further, down to what the page has room for.
_MOST_BUCKETS = 4096
_NAME_CHARS = 120
_MOST_STEP = 1 << 53
_MOST_MARKS = 200
_NO_STEP = np.iinfo(np.int64).max
# Of a row, but no curve of its own.
_NO_CURVES = frozenset({"step", "samples", "steps_s", "nonfinite", "applied", "skipped"})


@dataclass(frozen=True)
class Buckets:
    """B buckets of S numbers. `key`: step // length. `last`: the last step. Values and their steps: [B, S]; NaN: no value."""

    key: Steps
    last: Steps
    low: Floats
    low_step: Steps
    high: Floats
    high_step: Steps
    total: Floats
    count: Steps

    def rows(self, part: slice) -> Buckets:
        return Buckets(*(values[part] for values in self.__dict__.values()))

    def widened(self, names: int) -> Buckets:
        """With columns for new names."""
        more = names - self.low.shape[1]
        if more <= 0:
            return self
        new = _of_rows(self.last, np.full((len(self.key), more), np.nan))
        return Buckets(
            self.key,
            self.last,
            np.hstack((self.low, new.low)),
            np.hstack((self.low_step, new.low_step)),
            np.hstack((self.high, new.high)),
            np.hstack((self.high_step, new.high_step)),
            np.hstack((self.total, new.total)),
            np.hstack((self.count, new.count)),
        )

    def merged(self, key: Steps) -> Buckets:
        """Buckets that have the same new key become one. `key`: ascending, [B]."""
        starts = np.flatnonzero(np.diff(key, prepend=key[0] - 1)) if len(key) else np.zeros(0, np.int64)
        if len(starts) == len(key):
            return Buckets(key, self.last, self.low, self.low_step, self.high, self.high_step, self.total, self.count)
        sizes = np.diff(starts, append=len(key))
        low, high = np.fmin.reduceat(self.low, starts), np.fmax.reduceat(self.high, starts)
        low_at = np.where(self.low == np.repeat(low, sizes, axis=0), self.low_step, _NO_STEP)
        high_at = np.where(self.high == np.repeat(high, sizes, axis=0), self.high_step, _NO_STEP)
        return Buckets(
            key[starts],
            np.maximum.reduceat(self.last, starts),
            low,
            np.minimum.reduceat(low_at, starts),
            high,
            np.minimum.reduceat(high_at, starts),
            np.add.reduceat(self.total, starts),
            np.add.reduceat(self.count, starts),
        )


def _join(one: Buckets, other: Buckets) -> Buckets:
    pairs = zip(one.__dict__.values(), other.__dict__.values(), strict=True)
    return Buckets(*(np.concatenate(pair) for pair in pairs))


def _of_rows(steps: Steps, values: Floats) -> Buckets:
    """A bucket for each row. `values`: [rows, S]."""
    there = np.isfinite(values)
    values = np.where(there, values, np.nan)
    at = np.where(there, steps[:, None], _NO_STEP)
    return Buckets(steps, steps, values, at, values, at, np.where(there, values, 0.0), there.astype(np.int64))


class Curves:
    """Takes rows and gives points. `rows`, `last_step`, `left_out`: how many rows counted, the newest step, rows left out."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows = self.last_step = self.left_out = 0
        self.marks: list[dict[str, Any]] = []
        self.newest: dict[str, float] = {}
        self._known: set[str] = set(_NO_CURVES)
        self._length = 1
        self._buckets = _of_rows(np.zeros(0, np.int64), np.zeros((0, 0)))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take the rows of a part of the record, as JSON has them."""
        steps, kept = [], []
        for row in rows:
            step = row.get("step")
            if type(step) is not int or not self.last_step < step < _MOST_STEP:
                self.left_out += 1
                continue
            self.last_step = step
            steps.append(step)
            kept.append(row)
        if not kept:
            return
        self.rows += len(kept)
        self._look_at_names(kept)
        values = _matrix(kept, self.names)
        latest = _of_rows(np.array(steps, np.int64), values)
        known = self._buckets.widened(len(self.names))
        # Only the last bucket may get more steps.
        latest = _join(known.rows(slice(-1, None)), latest.merged(latest.key // self._length))
        self._buckets = _join(known.rows(slice(None, -1)), latest.merged(latest.key))
        while len(self._buckets.key) > _MOST_BUCKETS:
            self._length *= 2
            self._buckets = self._buckets.merged(self._buckets.key // 2)
        self.newest |= {name: value for name, value in zip(self.names, _newest(values), strict=True) if np.isfinite(value)}

    def points(self, room: int) -> dict[str, Any]:
        """The curves in some `room` buckets over all names, as the page takes them.

        `axis`: tokens and seconds in steps, at the end of the step `steps`. Each curve has `x`, the steps as differences, `y` and
        `mean`, that of each bucket in the middle of its steps `middle`; it is absent where all values are there.
        """
        found = self._buckets
        most = max(50, room // max(len(self.names), 1))
        group = max(1, -(-len(found.key) // most))
        if group > 1:
            found = found.merged(np.arange(len(found.key)) // group)
        is_whole = bool((found.count <= 1).all())
        last = found.last
        first = np.concatenate(([0], last[:-1])) + 1
        curves = [self._curve(found, column, is_whole) for column in range(len(self.names))]
        document = {"rows": self.rows, "last_step": self.last_step, "left_out": self.left_out, "marks": self.marks}
        document |= {"axis": self._axis(found), "curves": curves, "newest": self.newest, "whole": is_whole}
        return document if is_whole else document | {"middle": _differences((first + last) // 2)}

    def _curve(self, found: Buckets, column: int, is_whole: bool) -> dict[str, Any]:
        low, high = found.low[:, column], found.high[:, column]
        low_at, high_at = found.low_step[:, column], found.high_step[:, column]
        there = np.isfinite(low)
        # Both extremes in the order of their steps, and once where they are the same.
        is_first = low_at <= high_at
        x = np.stack([np.where(is_first, low_at, high_at), np.where(is_first, high_at, low_at)], axis=1)[there]
        y = np.stack([np.where(is_first, low, high), np.where(is_first, high, low)], axis=1)[there]
        keep = np.ones(x.shape, bool)
        keep[:, 1] = x[:, 1] != x[:, 0]
        curve: dict[str, Any] = {"name": self.names[column], "x": _differences(x[keep]), "y": _short(y[keep])}
        if not is_whole:
            count = found.count[:, column]
            means = np.where(count > 0, found.total[:, column] / np.maximum(count, 1), np.nan)
            curve["mean"] = _short(means, digits=5)
        return curve

    def _axis(self, found: Buckets) -> dict[str, Any]:
        axis: dict[str, Any] = {"steps": _differences(found.last)}
        if "tokens" in self.names:
            axis["tokens"] = _short(found.high[:, self.names.index("tokens")], digits=9)
        if "step_time_s" in self.names:
            axis["seconds"] = _short(np.cumsum(found.total[:, self.names.index("step_time_s")]))
        return axis

    def _look_at_names(self, rows: Sequence[dict[str, Any]]) -> None:
        """Learn new names, and mark rows. The names of all rows together are looked at first, since few parts have other ones."""
        names: set[str] = set().union(*rows)
        if not names <= self._known:
            for row in rows:
                self._learn(row)
        if names & {"nonfinite", "skipped"}:
            for row in rows:
                if "nonfinite" in row or row.get("skipped") is True:
                    self._mark(row)

    def _learn(self, row: dict[str, Any]) -> None:
        """New names of numbers. Names beyond MOST_NAMES are passed over."""
        for name, value in row.items():
            if name in self._known or (value is not None and type(value) not in (int, float)):
                continue
            if len(name) <= _NAME_CHARS and len(self.names) < MOST_NAMES:
                self.names.append(name)
                self._known.add(name)

    def _mark(self, row: dict[str, Any]) -> None:
        if len(self.marks) < _MOST_MARKS:
            nonfinite = row.get("nonfinite")
            what = ", ".join(map(str, list(nonfinite)[:4])) if isinstance(nonfinite, dict) else ""
            text = f"not finite: {what}" if what else "step not applied"
            self.marks.append({"step": row["step"], "kind": "nonfinite" if what else "skip", "text": text[:200]})


def _matrix(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Floats:
    """Values of the rows, [rows, names]; NaN: no number."""
    table = [[row.get(name) for name in names] for row in rows]
    try:
        return np.array(table, dtype=np.float64).reshape(len(rows), len(names))
    except (ValueError, TypeError, OverflowError):
        return np.array([[_as_float(value) for value in line] for line in table]).reshape(len(rows), len(names))


def _as_float(value: Any) -> float:
    is_number = type(value) in (int, float) and abs(value) < 1e300
    return float(value) if is_number else np.nan


def _newest(values: Floats) -> Floats:
    """The last value of each column; NaN: it has none."""
    there = np.isfinite(values)
    index = len(values) - 1 - np.argmax(there[::-1], axis=0)
    return np.where(there.any(axis=0), values[index, np.arange(values.shape[1])], np.nan)


def _differences(steps: Steps) -> list[int]:
    return np.diff(steps, prepend=0).tolist()


def _short(values: Floats, digits: int = 7) -> list[float | int | None]:
    """Numbers of some digits; whole numbers without a decimal point; null for NaN."""
    return [_number(text) for text in np.char.mod(f"%.{digits}g", values).tolist()]


def _number(text: str) -> float | int | None:
    if text == "nan":
        return None
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
