"""A log on a disk that may fail. In: text. Out: the file, without the text that the disk refused; the log then says how much.

Python raises OSError at a print to a full disk. A run must not end because a log of its processes can't grow.

Torch-free.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from typing import Any


class LogFile(io.RawIOBase):
    """A raw stream on an open descriptor. `write` raises no OSError."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lost_bytes = 0
        self._why = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        try:
            if self._lost_bytes:
                os.write(self._descriptor, f"\nphalanx: {self._lost_bytes} bytes of this log were lost: {self._why}\n".encode())
                self._lost_bytes = 0
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._lost_bytes += len(rest)
            self._why = error.strerror or str(error)
        return num_bytes


def guard_logs() -> None:
    """Replace stdout and stderr, where they are files, by streams that lose text rather than raise OSError."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if is_file(stream.fileno()):
            stream.flush()
            setattr(sys, name, log_stream(stream))


def is_file(descriptor: int) -> bool:
    """Whether the descriptor is that of a regular file."""
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def log_stream(stream: Any) -> io.TextIOWrapper:
    """A text stream on the descriptor of `stream`, with its settings. It is flushed at each line."""
    # TextIOWrapper buffers text by itself, and LogFile takes all bytes at once. typeshed asks for a buffer in between.
    raw: Any = LogFile(stream.fileno())
    through = getattr(stream, "write_through", False)
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True, write_through=through)
