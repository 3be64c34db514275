"""Where metrics go. In: one row a step. Out: the console, the record, W&B; every sink behind the same three calls.

Keys of a row that sinks know: step, loss, grad_norm, lr, tokens (trained on since the run began), tokens_per_s,
step_time_s, and val_loss on the steps that validated. All others are passed through.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pretrain.run.folder import Outcome
from pretrain.run.record import Record


class Sink(Protocol):
    def write(self, row: dict[str, Any]) -> None:
        """One step's row, complete."""
        ...

    def show_message(self, text: str) -> None:
        """Show one line of text, for example on a resume."""
        ...

    def close(self, outcome: Outcome | None) -> None:
        """The attempt's end; None: it broke before it had an outcome. Bounded in time."""
        ...


class NullSink:
    """A sink that discards everything."""

    def write(self, row: dict[str, Any]) -> None:
        return

    def show_message(self, text: str) -> None:
        return

    def close(self, outcome: Outcome | None) -> None:
        return


class RecordSink:
    """The record as a sink. First in the list: what others copy or show is in the record already."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def write(self, row: dict[str, Any]) -> None:
        self._record.append(row)

    def show_message(self, text: str) -> None:
        return

    def close(self, outcome: Outcome | None) -> None:
        self._record.close()


class Sinks:
    """Several sinks as one, called in order. A later sink's failure to close doesn't keep the others from closing."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def write(self, row: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(row)

    def show_message(self, text: str) -> None:
        for sink in self._sinks:
            sink.show_message(text)

    def close(self, outcome: Outcome | None) -> None:
        errors: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.close(outcome)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
