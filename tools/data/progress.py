"""Progress of a long command on stderr: a bar on a terminal, else a line every few seconds.

Torch-free.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_INTERVAL_S = 5.0


class ProgressMeter:
    """A context manager. `update(read_bytes, tokens)` adds to the totals; rates are averages over the whole run."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes, self.read_bytes, self.tokens = total_bytes, 0, 0
        self.start_s = self.line_s = time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(), "{task.percentage:>3.0f}%", TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
            bar = self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = bar.add_task("", total=max(total_bytes, 1), rate="")

    def rate(self) -> str:
        elapsed_s = max(time.monotonic() - self.start_s, 1e-9)
        speed = f"{self.read_bytes / elapsed_s / 1e6:.1f} MB/s, {self.tokens / elapsed_s:,.0f} tokens/s"
        return f"{self.read_bytes / 1e6:,.1f} of {self.total_bytes / 1e6:,.1f} MB read, {self.tokens:,} tokens, {speed}"

    def update(self, read_bytes: int, tokens: int) -> None:
        self.read_bytes += read_bytes
        self.tokens += tokens
        if self.bar:
            self.bar.update(self.task, completed=self.read_bytes, rate=self.rate())
        elif time.monotonic() - self.line_s >= LINE_INTERVAL_S:
            self.line_s = time.monotonic()
            print(self.rate(), file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressMeter:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
