"""Shows a local run while it trains. In: the attempt's log folder and the run's metrics. Out: text on the launcher's stdout.

A pipe, a file or a terminal without cursor movement (TERM=dumb) gets rank 0's log as it grows. Other terminals get a progress
bar made from the metrics, the log's other lines above the bar, and the summary below it. The launcher's thread only reads
files. A `ScreenWriter` waits for the reader in a thread of its own. A paused terminal or an unread pipe therefore delays
neither signals nor the watchdog.

Torch-free.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TextIO

from pretrain.metrics.console import LiveConsole
from pretrain.metrics.screen import redraws, screen_of
from pretrain.run.follow import RecordFollower

# The most that one look reads from the log. A reader takes this amount without a noticeable delay.
_READ_BYTES = 1 << 16
_FINISH_POLL_S = 0.05
# PlainConsole's line for a step. The progress bar shows its content.
_STEP_LINE = re.compile(rb"step +\d+/\d+  ")
_END_LINE = re.compile(rb"(finished|stopped|preempted|diverged|failed) at step \d+: ")


class RunView:
    """Shows one attempt.

    Nothing more of rank 0's log is shown once rank 0 has failed. The launcher prints the traceback of the rank that failed
    first, which may be another rank.
    """

    def __init__(self, log_dir: Path, record: Path, out: TextIO | None, total_steps: int) -> None:
        self._log = log_dir / "rank_0.log"
        self._failure = log_dir / "rank_0.failure.json"
        self._offset = 0
        self._torn = b""
        self._out = out
        self._screen = screen_of(out)
        self._bar: LiveConsole | None = None
        self._rows = RecordFollower(record, from_end=True)
        if self._screen is not None and redraws(self._screen):
            self._bar = LiveConsole(self._screen, total_steps)

    def pump(self) -> None:
        """Show the text that came since the last call. Shows nothing while the reader is behind, and never blocks."""
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
        """Show the rest of the log with the summary, and close the screen. Call it when all ranks are gone.

        The call waits until the reader has taken the text or is gone.
        """
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
        """Show one line of the log. It stands above the progress bar while there is one."""
        if self._bar is None:
            self._write(line + b"\n")
        elif _END_LINE.match(line):
            self._bar.show_message(line.decode(errors="replace"))
            self._bar.close(None)
            self._bar = None
        elif not _STEP_LINE.match(line):
            self._bar.show_message(line.decode(errors="replace"))

    def _unread_bytes(self) -> int:
        """How many bytes of the log are not shown yet. 0 once rank 0 has failed."""
        if not self._log.exists():
            return 0
        # Rank 0 writes its failure file before the traceback. A size read before the check for that file excludes the traceback.
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
