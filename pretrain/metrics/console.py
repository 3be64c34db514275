"""The console sink. In: rows. Out: aligned lines in a log or a pipe, and a live bar with the remaining time on a terminal.

Under torchrun by hand, rank 0's stdout may be the terminal. Under our launcher it is a log file; the launcher draws its own
bar from the run folder (launch/local/view.py).

Torch-free.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from configs.units import count, duration
from pretrain.metrics.screen import ScreenWriter, redraws, screen_of
from pretrain.metrics.sinks import Sink
from pretrain.run.folder import Outcome

# The number of steps whose median time gives the remaining time. One slow step, with a save or a validation, doesn't change it.
_ETA_STEPS = 20
# In seconds, between two frames. Drawing one takes about a millisecond of the thread that writes the rows.
_REFRESH_S = 0.1
# Narrower terminals show only the loss, the speed and the remaining time.
_WIDE_COLUMNS = 130


class PlainConsole:
    """Writes an aligned line every `interval_steps` steps, after each validation and after the last step."""

    def __init__(self, stream: TextIO | ScreenWriter, total_steps: int, interval_steps: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._interval_steps = interval_steps
        self._eta = _Eta(total_steps)

    def write(self, row: dict[str, Any]) -> None:
        eta_s = self._eta.after(row)
        step = row["step"]
        if step % self._interval_steps == 0 or step == self._total_steps or val_losses(row):
            width = len(str(self._total_steps))
            self._say(f"step {step:>{width}}/{self._total_steps}  " + "  ".join([*numbers(row), f"eta {duration(eta_s):>8}"]))

    def show_message(self, text: str) -> None:
        self._say(text)

    def close(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._say(f"{outcome.state} at step {outcome.step}: {outcome.why}")

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveConsole:
    """Draws a bar with the newest numbers, as wide as the terminal. Frames that a slow terminal can't take are left out."""

    def __init__(self, screen: ScreenWriter, total_steps: int) -> None:
        self._screen = screen
        self._eta = _Eta(total_steps)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            console=Console(file=cast(TextIO, screen), force_terminal=True, width=screen.columns()),
            redirect_stdout=False,
            redirect_stderr=False,
            auto_refresh=False,
        )
        self._refreshed_s = 0.0
        self._row: dict[str, Any] = {}
        self._eta_s: float | None = None
        self._task = self._progress.add_task("", total=total_steps, numbers="")
        self._progress.start()

    def write(self, row: dict[str, Any]) -> None:
        self._row, self._eta_s = row, self._eta.after(row)
        if not self._screen.is_behind and time.monotonic() - self._refreshed_s >= _REFRESH_S:
            self._draw()

    def _draw(self) -> None:
        """Draw the newest row as a frame."""
        self._refreshed_s = time.monotonic()
        # The window may have been resized since the last frame.
        self._progress.console.width = self._screen.columns()
        row = self._row
        short = {key: row[key] for key in ("loss", "tokens_per_s") if key in row} | val_losses(row)
        wide = self._progress.console.width >= _WIDE_COLUMNS
        shown = [" ".join(text.split()) for text in numbers(row if wide else short)]
        self._progress.update(self._task, completed=row["step"], numbers="  ".join([*shown, f"eta {duration(self._eta_s)}"]))
        self._progress.refresh()

    def show_message(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, outcome: Outcome | None) -> None:
        if self._row:
            self._draw()
        if outcome is not None:
            self.show_message(f"{outcome.state} at step {outcome.step}: {outcome.why}")
        self._progress.stop()
        self._screen.drain()


def make_console(total_steps: int, interval_steps: int, stdout: TextIO | None = None) -> Sink:
    """The live bar when the stream is a terminal with cursor movement, plain lines otherwise.

    `stdout` None: the stdout of this process.
    """
    stream: TextIO | ScreenWriter = stdout if stdout is not None else sys.stdout
    if redraws(stream):
        screen = stream if isinstance(stream, ScreenWriter) else screen_of(stream)
        if screen is not None:
            return LiveConsole(screen, total_steps)
    return PlainConsole(stream, total_steps, interval_steps)


def numbers(row: Mapping[str, Any]) -> list[str]:
    """The row's main numbers as texts of fixed width. Numbers that the row lacks are left out."""
    parts = [f"loss {_fixed(row.get('loss'), 8, 4)}"]
    if "grad_norm" in row:
        parts.append(f"grad norm {_fixed(row['grad_norm'], 8, 3)}")
    if row.get("lr") is not None:
        parts.append(f"lr {row['lr']:8.2e}")
    if row.get("tokens_per_s") is not None:
        parts.append(f"{count(row['tokens_per_s']):>6} tokens/s")
    if row.get("step_time_s") is not None:
        parts.append(f"{row['step_time_s']:7.3f} s/step")
    parts += [f"{key.replace('val_loss', 'val loss').replace('/', ' ')} {loss:.4f}" for key, loss in val_losses(row).items()]
    return parts


def val_losses(row: Mapping[str, Any]) -> dict[str, float]:
    """The validation losses of a row by key: val_loss, and val_loss/NAME of each set of data.valid_sets."""
    return {key: loss for key, loss in row.items() if (key == "val_loss" or key.startswith("val_loss/")) and loss is not None}


class _Eta:
    """Estimates the remaining time in seconds from the median duration of the last steps."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._times_s: deque[float] = deque(maxlen=_ETA_STEPS)

    def after(self, row: Mapping[str, Any]) -> float | None:
        if row.get("step_time_s") is not None:
            self._times_s.append(row["step_time_s"])
        if not self._times_s:
            return None
        return statistics.median(self._times_s) * max(0, self._total_steps - row["step"])


def _fixed(value: float | None, width: int, digits: int) -> str:
    return f"{value:{width}.{digits}f}" if value is not None else "?".rjust(width)
