"""The reports of an attempt. In: an event. Out: a row of events.jsonl and, from `announce` and `tell`, a line on stderr.

A failing disk doesn't end the training. Events that it refuses wait in memory, and the next event or save tries again.

Torch-free.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from configs.errors import ConfigError
from pretrain.run.attempt import Attempt
from pretrain.run.event_log import sync_events
from pretrain.run.events import EventKind
from pretrain.run.files import storage_error
from pretrain.run.record_rows import encode_row


class Journal:
    """Reports of rank 0's attempt. On the other ranks `attempt` is None, and nothing is written or printed."""

    def __init__(self, attempt: Attempt | None) -> None:
        self._attempt = attempt
        self._waiting: deque[tuple[float, EventKind, dict[str, Any]]] = deque()
        self._is_refused = False

    def write_event(self, kind: EventKind, **fields: Any) -> None:
        """Append one row to events.jsonl. It waits in memory when the disk refuses it."""
        if self._attempt is None:
            return
        self._waiting.append((time.time(), kind, encode_row(fields)))
        try:
            self._write_waiting(self._attempt)
        except ConfigError as error:
            if not self._is_refused:
                self._is_refused = True
                say(f"events wait in memory: {error.problems[0].rule}; training goes on")

    def tell(self, kind: EventKind, **fields: Any) -> None:
        """Append one row as `write_event` does, and print it on stderr. NaN and infinity are allowed."""
        if self._attempt is not None:
            self.write_event(kind, **fields)
            words = ", ".join(f"{key} {value}" for key, value in fields.items())
            say(f"{kind.replace('_', ' ')}: {words}")

    def announce(self, kind: EventKind, **fields: Any) -> None:
        """Print a row on stderr and force it to the disk. NaN and infinity are allowed. Raises ConfigError."""
        self.tell(kind, **fields)
        self.sync()

    def sync(self) -> None:
        """Force every event to the disk. Raises ConfigError when the disk refuses."""
        if self._attempt is None:
            return
        self._write_waiting(self._attempt)
        folder = self._attempt.folder
        try:
            sync_events(folder)
        except OSError as error:
            raise storage_error("run.dir", folder.events, error) from error

    def _write_waiting(self, attempt: Attempt) -> None:
        """Append the waiting events in order, with the times at which they happened. Raises ConfigError."""
        while self._waiting:
            time_s, kind, fields = self._waiting[0]
            attempt.event(kind, time_s, **fields)
            self._waiting.popleft()
        self._is_refused = False


def say(text: str) -> None:
    """Print one line to stderr, which rank 0's log keeps."""
    print(f"phalanx: {text}", file=sys.stderr, flush=True)
