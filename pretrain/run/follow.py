"""Reading the record while it grows. In: metrics.jsonl. Out: the new rows at each poll.

Torch-free.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.run.files import parse_line
from pretrain.run.record import decode_row


class RecordFollower:
    """Reads metrics.jsonl while another process appends to it.

    A rollback replaces the file. The follower then reads the old file to its end and the new one from its start.
    `from_end`: leave out the rows that the file has when the follower is made.
    """

    def __init__(self, path: Path, from_end: bool = False) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._torn = b""
        if from_end and path.exists():
            self._file = open(path, "rb")  # noqa: SIM115  held as long as the follower lives
            self._file.seek(0, os.SEEK_END)

    def poll(self) -> list[dict[str, Any]]:
        """The rows since the last poll. After a rollback they include all rows of the new file, also those returned before."""
        if self._file is None:
            if not self._path.exists():
                return []
            self._file = open(self._path, "rb")  # noqa: SIM115
        # This is asked before reading. Nothing is appended to the old file after it was replaced, so no row is missed.
        replaced = not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        *lines, self._torn = (self._torn + self._file.read()).split(b"\n")
        rows = [decode_row(row) for line in lines if (row := parse_line(line)) is not None and "step" in row]
        if replaced:
            self._file.close()
            self._file, self._torn = None, b""
            rows += self.poll()
        return rows
