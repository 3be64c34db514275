"""Reads events.jsonl. In: a run folder. Out: rows that fit the table of pretrain/run/events.py.

A folder may hold junk, rows of another version of Phalanx, or the rest of another tool's file. A row whose fields have other
types than the table says is left out and counted, so that no reader meets it. A kind that the table does not have stays: each
reader passes over the kinds that it does not know.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pretrain.run.events import COMMON_FIELDS, EVENTS, EventField, EventKind
from pretrain.run.files import iterate_lines, recent_rows
from pretrain.run.folder import RunFolder


def _is_number(value: Any) -> bool:
    """NaN and infinity, which Python reads from JSON, are no numbers here: JSON has neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


# The JSON types of the table, without their units.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda value: isinstance(value, bool),
    "integer": _is_integer,
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "object": lambda value: isinstance(value, dict),
    "list of integers": _is_list_of(int),
    "list of objects": _is_list_of(dict),
    "list of strings": _is_list_of(str),
}


def is_event(row: Mapping[str, Any]) -> bool:
    """Does the row have the common fields, and all required fields of its kind, each of the table's type?"""
    if not all(_fits(field, row) for field in COMMON_FIELDS):
        return False
    if row["kind"] not in set(EventKind):
        return True
    return all(_fits(field, row) for field in EVENTS[EventKind(row["kind"])].fields)


def _fits(field: EventField, row: Mapping[str, Any]) -> bool:
    if field.name not in row:
        return field.optional
    value, kind = row[field.name], field.type.partition(",")[0]
    name = kind.removesuffix(" or null")
    return (value is None and name != kind) or _TYPES[name](value)


def scan_events(folder: RunFolder) -> Iterator[dict[str, Any] | None]:
    """Each complete line, oldest first: the event, or None where it is none. Empty without the file. Raises OSError."""
    if not folder.events.exists():
        return iter(())
    return (row if row is not None and is_event(row) else None for _, row in iterate_lines(folder.events))


def read_events(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The events, oldest first; empty when the file doesn't exist. Raises OSError."""
    return (event for event in scan_events(folder) if event is not None)


def recent_events(folder: RunFolder, tail_bytes: int = 1 << 18) -> list[dict[str, Any]]:
    """The events in the file's last `tail_bytes`, oldest first; empty when the file doesn't exist. Raises OSError."""
    return [row for row in recent_rows(folder.events, tail_bytes) if is_event(row)]
