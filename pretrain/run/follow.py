"""The record as it grows. In: metrics.jsonl. Out: its new rows at each look.

Torch-free.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.run.files import parse_line
from pretrain.run.record import decode_row


class RecordFollower:
    """Reads metrics.jsonl while another process appends. A rollback replaces the file: the old one is read to its end, then
    the new one from its start.

    `from_end`: the rows that are there at the beginning are passed over.
    """

    def __init__(self, path: Path, from_end: bool = False) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._torn = b""
        if from_end and path.exists():
            self._file = open(path, "rb")  # noqa: SIM115  held as long as the follower lives
            self._file.seek(0, os.SEEK_END)

    def poll(self) -> list[dict[str, Any]]:
        """The rows since the last poll; after a cut all rows of the new file, known ones among them."""
        if self._file is None:
            if not self._path.exists():
                return []
            self._file = open(self._path, "rb")  # noqa: SIM115
        # Asked before reading: what is written to the old file after the cut is nothing.
        replaced = not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        *lines, self._torn = (self._torn + self._file.read()).split(b"\n")
        rows = [decode_row(row) for line in lines if (row := parse_line(line)) is not None and "step" in row]
        if replaced:
            self._file.close()
            self._file, self._torn = None, b""
            rows += self.poll()
        return rows
