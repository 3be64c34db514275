"""Shows a text again and again: in its place on a terminal, one after the other elsewhere.

Torch-free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pretrain.metrics.screen import redraws

# (columns of the terminal, or None) -> (the text, whether it may still change)
Look = Callable[[int | None], tuple[str, bool]]


def terminal_columns(out: TextIO) -> int | None:
    """The width of the terminal. None: `out` is none."""
    try:
        return os.get_terminal_size(out.fileno()).columns if out.isatty() else None
    except OSError:
        return None


def watch(look: Look, every_s: float, out: TextIO, redraw: bool) -> None:
    """Show what `look` says every `every_s` seconds until it can't change any more.

    With `redraw` and on a terminal with cursor movement, each text takes the place of the one before. Lines are then cut to
    the window. Elsewhere a blank line stands between two texts, and a text that is the same as the one before is left out.
    """
    if redraw and redraws(out):
        _redraw(look, every_s, out)
        return
    before = ""
    while True:
        text, may_change = look(None)
        if text != before:
            print(f"\n{text}" if before and redraw else text, file=out, flush=True)
        if not may_change:
            return
        before = text
        time.sleep(every_s)


def _redraw(look: Look, every_s: float, out: TextIO) -> None:
    console = Console(file=out, highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            text, may_change = look(terminal_columns(out))
            live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            if not may_change:
                return
            time.sleep(every_s)
