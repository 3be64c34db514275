"""Output to a terminal or a pipe that never blocks the caller. In: text and a descriptor. Out: the text that the reader takes.

A terminal paused with Ctrl-S, a stalled ssh connection or an unread pipe blocks the thread that writes to it. Here that is a
thread of its own. When more than MOST_CHARS characters wait, further texts are dropped, and a later line tells their number.

Torch-free.
"""

from __future__ import annotations

import io
import os
import select
import threading
from collections import deque
from typing import TextIO

# The number of characters that may wait for the reader. A screen has about 20,000 characters.
MOST_CHARS = 1 << 20
# In seconds. At the end of a run, the remaining text waits this long for the reader.
CLOSE_S = 2.0
_WAIT_S = 1.0


class ScreenWriter(io.TextIOBase):
    """A text stream on a descriptor. `write` never blocks. When the reader is gone, text is discarded without an error."""

    def __init__(self, descriptor: int, encoding: str = "utf-8") -> None:
        super().__init__()
        self._descriptor = descriptor
        self._encoding = encoding
        self._texts: deque[str] = deque()
        self._waiting_chars = 0
        self._dropped = 0
        self._is_lost = False
        self._is_closing = False
        self._changed = threading.Condition()
        # A daemon thread, because a reader that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
        self._thread.start()

    @property
    def is_behind(self) -> bool:
        """Whether text waits for the reader. A new frame of a progress bar would then be late."""
        return self._waiting_chars > 0

    @property
    def is_lost(self) -> bool:
        """Whether the reader is gone: the window was closed, ssh lost its connection, or the reading program ended."""
        return self._is_lost

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def columns(self, default: int = 80) -> int:
        """The current width of the terminal in characters; `default` when the descriptor is no terminal."""
        try:
            return os.get_terminal_size(self._descriptor).columns or default
        except OSError:
            return default

    def write(self, text: str, /) -> int:
        with self._changed:
            if self._is_lost:
                return len(text)
            if self._waiting_chars + len(text) > MOST_CHARS:
                self._dropped += 1
                return len(text)
            self._texts.append(text)
            self._waiting_chars += len(text)
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Do nothing, because the thread writes without delay."""

    def drain(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait at most `timeout_s` seconds until everything is written. False: text still waits for the reader."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_lost or not self._waiting_chars, timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Drain, and end the thread. The descriptor stays open, because its opener closes it."""
        self.drain(timeout_s)
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        super().close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts or self._is_closing)
                if not self._texts:
                    return
                text = self._texts.popleft()
                dropped = 0 if self._texts else self._dropped
                self._dropped -= dropped
            told = f"phalanx: {dropped} texts were not shown: the reader did not take them in time\n" if dropped else ""
            is_taken = self._write_all((text + told).encode(self._encoding, "replace"))
            with self._changed:
                self._waiting_chars -= len(text)
                if not is_taken:
                    self._is_lost, self._waiting_chars = True, 0
                    self._texts.clear()
                self._changed.notify_all()

    def _write_all(self, data: bytes) -> bool:
        """Write all bytes. False: the reader is gone."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                # Another process set the shared terminal to non-blocking.
                select.select([], [self._descriptor], [], _WAIT_S)
            except OSError:
                return False
        return True


def redraws(stream: TextIO | ScreenWriter) -> bool:
    """Whether text on the stream can be replaced. A terminal without cursor movement (TERM=dumb) only takes further lines."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def screen_of(stream: TextIO | None) -> ScreenWriter | None:
    """A writer on the stream's descriptor. None: the stream is closed, or has no descriptor, like a text in memory."""
    if stream is None:
        return None
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return None
    return ScreenWriter(descriptor, stream.encoding or "utf-8")
