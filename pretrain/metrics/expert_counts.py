"""experts.jsonl: how many tokens of a step each expert took, layer by layer. In: counts of a step. Out: a bounded file.

A row: {"step", "tokens": of the step over all ranks, padding included, "layers": numbers of the MoE layers, "counts": [[tokens of
each expert] of each layer]}. Counts are taken before dropping, so that each layer adds up to tokens x experts a token. They are
the same under any layout.

The file keeps at most `most_rows` rows. Steps that are multiples of the interval have a row. Where a step would be one row too
many, the interval doubles and every other row goes. The interval follows from the step alone, so that a run with attempts and
rollbacks has the rows of a run without.

A failing disk does not end the training: the row is left out, and the first refusal is told.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.run.files import as_line, iterate_lines, mend_torn_line, storage_problem, write_atomically

MOST_BYTES = 16 << 20
_MOST_ROWS, _LEAST_ROWS = 256, 16
# A count of up to 6 digits, a comma and a blank.
_BYTES_PER_COUNT = 8


def most_rows(num_counts: int) -> int:
    """How many rows of `num_counts` counts (MoE layers x experts) the file keeps: at most 256, and some 16 MiB."""
    return max(_LEAST_ROWS, min(_MOST_ROWS, MOST_BYTES // (_BYTES_PER_COUNT * max(num_counts, 1))))


def interval_at(step: int, first: int, rows: int) -> int:
    """The interval in steps that holds at `step`: `first`, doubled until at most `rows` multiples are in 1..step."""
    interval = first
    while step // interval > rows:
        interval *= 2
    return interval


class ExpertCounts:
    """The file, opened by an attempt, which is its only writer. `interval_steps`: the interval of a new run."""

    def __init__(
        self, path: Path, layers: Sequence[int], num_experts: int, interval_steps: int, say: Callable[[str], None]
    ) -> None:
        self.path = path
        self._layers = list(layers)
        self._first = interval_steps
        self._rows = most_rows(len(layers) * num_experts)
        self._say = say
        self._is_refused = False

    def is_due(self, step: int) -> bool:
        return bool(self._layers) and self._first > 0 and step % self._interval(step) == 0

    def append(self, step: int, tokens: int, counts: Sequence[Sequence[int]]) -> None:
        """Add the row of a step that is due. `counts`: [MoE layers][experts]."""
        row = {"step": step, "tokens": tokens, "layers": self._layers, "counts": counts}
        try:
            interval = self._interval(step)
            if interval != self._interval(step - interval):
                self._keep(step - 1, interval)
            with open(self.path, "ab") as file:
                file.write(as_line(row))
        except OSError as error:
            self._refuse(error)

    def cut_back(self, step: int) -> None:
        """Remove the rows past `step`, at the start of an attempt or after a rollback."""
        try:
            mend_torn_line(self.path)
            self._keep(step, self._interval(step))
        except OSError as error:
            self._refuse(error)

    def _interval(self, step: int) -> int:
        return interval_at(step, max(self._first, 1), self._rows)

    def _keep(self, last_step: int, interval: int) -> None:
        """Rewrite the file with the rows up to `last_step` that are multiples of `interval`. Raises OSError."""
        if not self.path.exists():
            return
        kept, whole = [], True
        for line, row in iterate_lines(self.path):
            step = row.get("step") if row is not None else None
            stays = isinstance(step, int) and step <= last_step and step % interval == 0
            whole = whole and stays
            if stays:
                kept.append(line)
        if not whole:
            write_atomically(self.path, b"".join(kept))

    def _refuse(self, error: OSError) -> None:
        if not self._is_refused:
            self._is_refused = True
            self._say(f"expert counts are not written: {storage_problem('run.dir', self.path, error).rule}; training goes on")


def read_expert_counts(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete row of whole numbers, oldest first; empty without the file. Raises OSError."""
    if path.exists():
        yield from (row for _, row in iterate_lines(path) if row is not None and _is_row(row))


def _is_row(row: dict[str, Any]) -> bool:
    layers, counts = row.get("layers"), row.get("counts")
    if not (_are_counts([row.get("step"), row.get("tokens")]) and isinstance(layers, list) and isinstance(counts, list)):
        return False
    experts = {len(line) if isinstance(line, list) else 0 for line in counts}
    same = len(layers) == len(counts) and len(experts) == 1 and experts != {0}
    return same and _are_counts(layers) and all(map(_are_counts, counts))


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 53 for value in values)
