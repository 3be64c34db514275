"""The destinations of metrics. In: one row a step. Out: the console, the record and W&B, behind the same three methods.

Sinks use these keys of a row: step, loss, grad_norm, lr, tokens (trained on since the run began), tokens_per_s, step_time_s,
and val_loss, val_loss/NAME after steps with a validation. They pass all other keys through.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pretrain.run.folder import Outcome
from pretrain.run.record import Record


class Sink(Protocol):
    """The methods of every sink. Rank 0 calls them."""

    def write(self, row: dict[str, Any]) -> None:
        """Write the complete row of one step."""
        ...

    def show_message(self, text: str) -> None:
        """Show one line of text, for example on a resume."""
        ...

    def close(self, outcome: Outcome | None) -> None:
        """End the sink, within bounded time. `outcome` None: the attempt failed before it had an outcome."""
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
    """The record as a sink. It is the first in the list, so that the record has a row before other sinks copy or show it."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def write(self, row: dict[str, Any]) -> None:
        self._record.append(row)

    def show_message(self, text: str) -> None:
        return

    def close(self, outcome: Outcome | None) -> None:
        self._record.close()


class Sinks:
    """Several sinks as one, called in order. All are closed even if one fails to close; its error is raised at the end."""

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
