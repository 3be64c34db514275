"""The console. In: rows. Out: aligned lines in the log, and a live bar with ETA when there is a terminal.

Under torchrun by hand, rank 0's stdout may be the terminal. Under our launcher it is a log file, and the launcher names
its own terminal in PHALANX_TTY: the bar goes there and the log stays free of control codes.

Torch-free.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from configs.units import count, duration
from pretrain.metrics.sinks import Sink, Sinks
from pretrain.run.folder import Outcome

# Steps whose median time makes the ETA: one slow step (a save, a validation) doesn't move it.
_ETA_STEPS = 20
# Drawn by the training thread: a drawing thread of its own would outlive a lost terminal, and cost every step some lock.
_REFRESH_S = 0.1
# Narrower terminals see the loss, the speed and the ETA.
_WIDE_COLUMNS = 130


class PlainConsole:
    """One aligned line every `interval_steps`, and for each validation and the last step."""

    def __init__(self, stream: TextIO, total_steps: int, interval_steps: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._interval_steps = interval_steps
        self._eta = _Eta(total_steps)

    def write(self, row: dict[str, Any]) -> None:
        eta_s = self._eta.after(row)
        step = row["step"]
        if step % self._interval_steps == 0 or step == self._total_steps or "val_loss" in row:
            width = len(str(self._total_steps))
            self._say(f"step {step:>{width}}/{self._total_steps}  " + "  ".join([*numbers(row), f"eta {duration(eta_s):>8}"]))

    def note(self, text: str) -> None:
        self._say(text)

    def close(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._say(f"{outcome.state} at step {outcome.step}: {outcome.why}")

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveConsole:
    """A bar with the newest numbers. A terminal that goes away (closed window, lost ssh) is given up, training goes on."""

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self._eta = _Eta(total_steps)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            console=Console(file=stream, force_terminal=True),
            redirect_stdout=False,
            redirect_stderr=False,
            auto_refresh=False,
        )
        self._refreshed_s = 0.0
        self._task = self._progress.add_task("", total=total_steps, numbers="")
        with contextlib.suppress(OSError):
            self._progress.start()

    def write(self, row: dict[str, Any]) -> None:
        eta_s = self._eta.after(row)
        with contextlib.suppress(OSError):
            short = {key: row[key] for key in ("loss", "tokens_per_s", "val_loss") if key in row}
            wide = self._progress.console.width >= _WIDE_COLUMNS
            shown = [" ".join(text.split()) for text in numbers(row if wide else short)]
            self._progress.update(self._task, completed=row["step"], numbers="  ".join([*shown, f"eta {duration(eta_s)}"]))
            if time.monotonic() - self._refreshed_s > _REFRESH_S:
                self._refreshed_s = time.monotonic()
                self._progress.refresh()

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._progress.console.print(text, markup=False, highlight=False)

    def close(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            self.note(f"{outcome.state} at step {outcome.step}: {outcome.why}")
        with contextlib.suppress(OSError):
            self._progress.stop()


def make_console(total_steps: int, interval_steps: int, environ: Mapping[str, str], stdout: TextIO | None = None) -> Sink:
    """The bar where a person looks, lines elsewhere; both under our launcher (lines into the log, the bar on its terminal)."""
    stream: TextIO = stdout if stdout is not None else sys.stdout
    if stream.isatty():
        return LiveConsole(stream, total_steps)
    plain = PlainConsole(stream, total_steps, interval_steps)
    terminal = _open_terminal(environ.get("PHALANX_TTY", ""))
    return Sinks([plain, LiveConsole(terminal, total_steps)]) if terminal else plain


def numbers(row: Mapping[str, Any]) -> list[str]:
    """The row's numbers that people watch, each in a fixed width; what the row lacks is left out."""
    parts = [f"loss {_fixed(row.get('loss'), 8, 4)}"]
    if "grad_norm" in row:
        parts.append(f"grad norm {_fixed(row['grad_norm'], 8, 3)}")
    if row.get("lr") is not None:
        parts.append(f"lr {row['lr']:8.2e}")
    if row.get("tokens_per_s") is not None:
        parts.append(f"{count(row['tokens_per_s']):>6} tokens/s")
    if row.get("step_time_s") is not None:
        parts.append(f"{row['step_time_s']:7.3f} s/step")
    if row.get("val_loss") is not None:
        parts.append(f"val loss {row['val_loss']:.4f}")
    return parts


class _Eta:
    """Time left, from the median of the last steps."""

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


def _open_terminal(path: str) -> TextIO | None:
    """The launcher's terminal, when it is one and on this host."""
    if not path:
        return None
    try:
        stream = os.fdopen(os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC), "w")
    except OSError:
        return None
    return stream if stream.isatty() else None
