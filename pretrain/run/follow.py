"""Reading the record while it grows. In: metrics.jsonl. Out: the new rows at each poll.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.run.files import parse_line
from pretrain.run.record_rows import decode_row, is_row, place_before

_PART_BYTES, _LINE_BYTES = 1 << 22, 1 << 24
# The bytes before the place of reading, by which a record that was cut back is known: some rows with their times.
_KNOWN_BYTES = 1 << 12


class RecordFollower:
    """Reads metrics.jsonl while another process appends to it.

    A rollback cuts the file back, and other rows follow. The follower then begins again.
    `from_end`: leave out the rows that the file has when the follower begins. `first_step`: rows of earlier steps are not
    needed, and most of them are not read. `replaced`: how often the file was cut back or replaced.
    """

    def __init__(self, path: Path, from_end: bool = False, first_step: int = 1) -> None:
        self._path, self._from_end, self._first_step = path, from_end, first_step
        self._place, self._known, self._torn = 0, b"", b""
        self.replaced = 0
        if (from_end or first_step > 1) and path.exists():
            self._begin()

    @property
    def place(self) -> int:
        """Bytes of the file that have been read."""
        return self._place

    def poll(self) -> Iterator[dict[str, Any]]:
        """The rows since the last poll. After a rollback they include rows that were returned before. Raises OSError."""
        return (decode_row(row) for part in self.parts() for row in part if is_row(row))

    def parts(self) -> Iterator[list[dict[str, Any]]]:
        """The objects since the last call as JSON has them, not decoded, some megabytes at a time. Raises OSError."""
        while data := self._next():
            if len(self._torn) > _LINE_BYTES and b"\n" not in data:
                # No row is as long: the file is damaged, and the rest of the line may have gigabytes.
                continue
            *lines, self._torn = (self._torn + data).split(b"\n")
            yield [row for line in lines if (row := parse_line(line)) is not None]

    def _next(self) -> bytes:
        """The next bytes of the file; empty at its end."""
        while self._path.exists():
            with open(self._path, "rb") as file:
                file.seek(self._place - len(self._known))
                data = file.read(len(self._known) + _PART_BYTES)
            # Read at once with what follows, so that no cut can come between the two.
            if data.startswith(self._known):
                found = data[len(self._known) :]
                self._place, self._known = self._place + len(found), data[-_KNOWN_BYTES:]
                return found
            self.replaced += 1
            self._begin()
        return b""

    def _begin(self) -> None:
        self._torn = b""
        with open(self._path, "rb") as file:
            self._place = file.seek(0, 2) if self._from_end else place_before(self._path, self._first_step)
            file.seek(max(0, self._place - _KNOWN_BYTES))
            self._known = file.read(min(self._place, _KNOWN_BYTES))
