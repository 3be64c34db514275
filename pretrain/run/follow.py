"""Reading the record while it grows. In: metrics.jsonl. Out: the new rows at each poll.

Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.run.files import parse_line
from pretrain.run.record import decode_row

_PART_BYTES, _LINE_BYTES = 1 << 22, 1 << 24


class RecordFollower:
    """Reads metrics.jsonl while another process appends to it.

    A rollback replaces the file. The follower then reads the old file to its end and the new one from its start.
    `from_end`: leave out the rows that the file has when the follower is made. `replaced`: how often the file was replaced.
    """

    def __init__(self, path: Path, from_end: bool = False) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._torn = b""
        self.replaced = 0
        if from_end and path.exists():
            self._file = open(path, "rb")  # noqa: SIM115  held as long as the follower lives
            self._file.seek(0, os.SEEK_END)

    def poll(self) -> list[dict[str, Any]]:
        """The rows since the last poll. After a rollback they include all rows of the new file, also those returned before."""
        return [decode_row(row) for part in self.parts() for row in part if "step" in row]

    def parts(self) -> Iterator[list[dict[str, Any]]]:
        """The objects since the last call as JSON has them, not decoded, some megabytes at a time. Raises OSError."""
        while True:
            if self._file is None:
                if not self._path.exists():
                    return
                self._file = open(self._path, "rb")  # noqa: SIM115
            # This is asked before reading. Nothing is appended to the old file after it was replaced, so no row is missed.
            replaced = not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
            while data := self._file.read(_PART_BYTES):
                *lines, torn = (self._torn + data).split(b"\n")
                # No row is as long: the file is damaged, and its rest may have gigabytes.
                self._torn = torn if len(torn) <= _LINE_BYTES else b""
                yield [row for line in lines if (row := parse_line(line)) is not None]
            if not replaced:
                return
            self._file.close()
            self._file, self._torn = None, b""
            self.replaced += 1
