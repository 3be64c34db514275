"""The reports of an attempt. In: an event. Out: a row of events.jsonl and, from `announce`, a line on stderr.

Torch-free.
"""

from __future__ import annotations

import sys
from typing import Any

from configs.errors import ConfigError
from pretrain.run.attempt import Attempt
from pretrain.run.event_log import sync_events
from pretrain.run.events import EventKind
from pretrain.run.files import storage_problem
from pretrain.run.record import encode_row


class Journal:
    """Reports of rank 0's attempt. On the other ranks `attempt` is None, and nothing is written or printed."""

    def __init__(self, attempt: Attempt | None) -> None:
        self._attempt = attempt

    def write_event(self, kind: EventKind, **fields: Any) -> None:
        """Append one row to events.jsonl. Raises ConfigError when the disk refuses it."""
        if self._attempt is not None:
            self._attempt.event(kind, **fields)

    def announce(self, kind: EventKind, **fields: Any) -> None:
        """Append one row, force it to the disk, and print it on stderr. NaN and infinity are allowed. Raises ConfigError."""
        if self._attempt is None:
            return
        self._attempt.event(kind, **encode_row(fields))
        folder = self._attempt.folder
        try:
            sync_events(folder)
        except OSError as error:
            raise ConfigError(storage_problem("run.dir", folder.events, error)) from error
        words = ", ".join(f"{key} {value}" for key, value in fields.items())
        print(f"phalanx: {kind.replace('_', ' ')}: {words}", file=sys.stderr, flush=True)
