"""TensorBoard's event files of a run. In: rows of the record. Out: one event a step, with every number of the row as a scalar.

An event is one record with a checksum, so a killed writer leaves a step whole or not at all. Where the record has replaced a step
after a rollback, a session start discards the steps from there on, as TensorBoard's readers know it.

Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# What tells two versions of a step apart: the samples consumed, and the loss as the file has it.
Version = tuple[int, str]


class TensorboardStore:
    """The event files of a folder, continued in a file of this attempt's own. Raises ImportError without TensorBoard."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415  an optional package

        self._event, self._session, self._summary = _messages()
        self._versions = read_versions(folder)
        self._writer = EventFileWriter(str(folder))

    def write(self, row: dict[str, Any]) -> None:
        step, version = row["step"], version_of(row)
        if self._versions.get(step) == version:
            return
        if step in self._versions:
            self._versions = {known: kept for known, kept in self._versions.items() if known < step}
            start = self._session(status=self._session.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=step, session_log=start))
        numbers = {key: float(value) for key, value in row.items() if is_number(value) and key != "step"}
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._versions[step] = version

    def flush(self) -> None:
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        self._writer.close()


def read_versions(folder: Path) -> dict[int, Version]:
    """The steps that the files of a folder have. A file's damaged end is left out."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # noqa: PLC0415

    event_class, session, _ = _messages()
    found: dict[int, Version] = {}
    for path in sorted(folder.glob("*tfevents*")):
        for raw in RawEventFileLoader(str(path)).Load():
            event = event_class.FromString(raw)
            if event.HasField("session_log") and event.session_log.status == session.START:
                found = {step: version for step, version in found.items() if step < event.step}
            elif event.HasField("summary"):
                found[event.step] = version_of({value.tag: value.simple_value for value in event.summary.value})
    return found


def _messages() -> tuple[Any, Any, Any]:
    """The classes Event, SessionLog and Summary of the files' format."""
    from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415

    events: Any = event_pb2
    summaries: Any = summary_pb2
    return events.Event, events.SessionLog, summaries.Summary


def version_of(row: Mapping[str, Any]) -> Version:
    """What tells a row from another row of the same step: its samples and loss, as event files hold them."""
    # Event files have float32.
    return int(np.float32(row.get("samples", 0))), str(np.float32(row["loss"]))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
