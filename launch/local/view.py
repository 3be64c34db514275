"""What a person sees of a local run. In: the attempt's log folder and the run's record. Out: text on the launcher's stdout.

In a pipe or a file: rank 0's log as it grows. On a terminal: a bar made from the record, the log's other lines above it, and
the summary below. The launcher's own thread only reads files; a `ScreenWriter` waits for the reader, so that a paused
terminal or an unread pipe holds up neither signals nor the watchdog.

Torch-free.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TextIO

from pretrain.metrics.console import LiveConsole
from pretrain.metrics.screen import screen_of
from pretrain.run.follow import RecordFollower

# Of the log, in one look: what a reader takes in a moment.
_READ_BYTES = 1 << 16
_FINISH_POLL_S = 0.05
# A step's line of PlainConsole: the bar shows it.
_STEP_LINE = re.compile(rb"step +\d+/\d+  ")
_END_LINE = re.compile(rb"(finished|stopped|preempted|diverged|failed) at step \d+: ")


class RunView:
    """Shows one attempt until rank 0 fails: the traceback that counts is the first failing rank's, which the launcher tells."""

    def __init__(self, log_dir: Path, record: Path, out: TextIO | None, total_steps: int) -> None:
        self._log = log_dir / "rank_0.log"
        self._failure = log_dir / "rank_0.failure.json"
        self._offset = 0
        self._torn = b""
        self._out = out
        self._screen = screen_of(out)
        self._bar: LiveConsole | None = None
        self._rows = RecordFollower(record, from_end=True)
        if self._screen is not None and self._screen.isatty():
            self._bar = LiveConsole(self._screen, total_steps)

    def pump(self) -> None:
        """Show what came since the last call; nothing while the reader is behind. Never waits."""
        if self._screen is not None and self._screen.is_behind:
            return
        if self._bar is None:
            self._write(self._read_log())
            return
        for row in self._rows.poll():
            self._bar.write(row)
        *lines, self._torn = (self._torn + self._read_log()).split(b"\n")
        for line in lines:
            self._show(line)

    def finish(self) -> None:
        """Show the rest, the summary with it. The ranks are gone: from here on the launcher waits for its reader."""
        while self._unread_bytes() and not (self._screen is not None and self._screen.is_lost):
            self.pump()
            time.sleep(_FINISH_POLL_S if self._screen is not None and self._screen.is_behind else 0.0)
        if self._bar is not None:
            self._bar.close(None)
            self._bar = None
        if self._torn:
            self._write(self._torn + b"\n")
        if self._screen is not None:
            while not self._screen.drain():
                pass
            self._screen.close()

    def _show(self, line: bytes) -> None:
        """A line of the log, above the bar while there is one."""
        if self._bar is None:
            self._write(line + b"\n")
        elif _END_LINE.match(line):
            self._bar.show_message(line.decode(errors="replace"))
            self._bar.close(None)
            self._bar = None
        elif not _STEP_LINE.match(line):
            self._bar.show_message(line.decode(errors="replace"))

    def _unread_bytes(self) -> int:
        """What the log has beyond what was shown; 0 once rank 0 has failed."""
        if not self._log.exists():
            return 0
        # The failure file is written before the traceback: a size taken before the look at it is free of the traceback.
        size = self._log.stat().st_size
        return 0 if self._failure.exists() else size - self._offset

    def _read_log(self) -> bytes:
        count = min(self._unread_bytes(), _READ_BYTES)
        if count <= 0:
            return b""
        with open(self._log, "rb") as file:
            file.seek(self._offset)
            data = file.read(count)
        self._offset += len(data)
        return data

    def _write(self, data: bytes) -> None:
        text = data.decode(errors="replace")
        if self._screen is not None:
            self._screen.write(text)
        elif self._out is not None and text:
            self._out.write(text)
            self._out.flush()
