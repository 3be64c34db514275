"""Sinks: the same three calls everywhere; lines that align, a bar on a terminal, a summary that says what to do next."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from configs.units import count, duration
from pretrain.metrics.console import LiveConsole, PlainConsole, make_console
from pretrain.metrics.screen import ScreenWriter
from pretrain.metrics.sinks import NullSink, RecordSink, Sinks
from pretrain.metrics.summary import RunSummary, summary
from pretrain.run.folder import Outcome, RunFolder
from pretrain.run.record import Record
from pretrain.run.record_rows import read_rows


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 7.5,
        "grad_norm": 1.25,
        "lr": 3e-4,
        "tokens": 1,
        "tokens_per_s": 12345.0,
        "step_time_s": 0.5,
    } | more


def test_plain_lines_align_and_respect_the_interval() -> None:
    out = io.StringIO()
    console = make_console(200, 10, out)
    for step in (1, 10, 15, 200):
        console.write(row(step, **({"val_loss": 6.9} if step == 15 else {})))
    console.show_message("saved step 200")
    console.close(Outcome(1, "finished", "all 200 steps", 200, 1600))
    assert out.getvalue().splitlines() == [
        "step  10/200  loss   7.5000  grad norm    1.250  lr 3.00e-04   12.3k tokens/s    0.500 s/step  eta     1:35",
        "step  15/200  loss   7.5000  grad norm    1.250  lr 3.00e-04   12.3k tokens/s    0.500 s/step  "
        "val loss 6.9000  eta     1:32",
        "step 200/200  loss   7.5000  grad norm    1.250  lr 3.00e-04   12.3k tokens/s    0.500 s/step  eta     0:00",
        "saved step 200",
        "finished at step 200: all 200 steps",
    ]


def test_numbers_for_people() -> None:
    assert [count(value) for value in (0.5, 12, 1234, 5_600_000, 7.8e9)] == ["0.5", "12", "1.23k", "5.6M", "7.8G"]
    assert [duration(value) for value in (None, 5, 754, 3723, 360_000)] == ["?", "0:05", "12:34", "1:02:03", "4d 04h"]


def read_all(master: int) -> str:
    """What was written to a terminal; the kernel hands it over in pieces, the last of them within a moment."""
    pieces = []
    while select.select([master], [], [], 1.0)[0]:
        try:
            pieces.append(os.read(master, 1 << 16))
        except OSError:
            # The other end is closed.
            break
    return b"".join(pieces).decode()


def test_a_terminal_gets_a_bar_of_its_own_width() -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    with os.fdopen(slave, "w") as stream:
        console = make_console(2, 1, stream)
        console.write(row(2))
        console.close(Outcome(1, "finished", "done", 2, 2))
    shown = read_all(master)
    frame = next(line for line in re.split(r"[\r\n]+", shown) if "2/2" in line)
    assert "\x1b[" in shown and len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame)) > 130


def test_a_lost_terminal_does_not_stop_training() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        console = LiveConsole(ScreenWriter(stream.fileno()), 10)
        os.close(master)
        for step in range(1, 4):
            console._refreshed_s = 0.0
            console.write(row(step))
        console.show_message("still here")
        console.close(None)


def test_a_paused_terminal_does_not_stop_training() -> None:
    """Nobody reads the other end, as after Ctrl-S: rows and notes go on, frames are left out, closing takes a bounded time."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        console = LiveConsole(ScreenWriter(stream.fileno()), 100_000)
        started_s = time.monotonic()
        for step in range(1, 3001):
            console._refreshed_s = 0.0
            console.write(row(step))
            console.show_message("a line that is longer than what a terminal takes in one piece " * 3)
        assert time.monotonic() - started_s < 60
        console.close(None)
        os.close(master)


def test_the_record_comes_first_and_every_sink_closes(tmp_path: Path) -> None:
    class Failing(NullSink):
        def close(self, outcome: Outcome | None) -> None:
            raise OSError("no")

    out = io.StringIO()
    record = Record.open(tmp_path / "metrics.jsonl", 0, lambda kind, **fields: None)
    sinks = Sinks([Failing(), RecordSink(record), PlainConsole(out, 1, 1)])
    sinks.write(row(1))
    with pytest.raises(OSError, match="no"):
        sinks.close(Outcome(1, "finished", "done", 1, 1))
    assert [found["step"] for found in read_rows(tmp_path / "metrics.jsonl")] == [1]
    assert out.getvalue().endswith("finished at step 1: done\n")


def test_summary_says_what_was_reached_and_what_comes_next(tmp_path: Path) -> None:
    run = RunSummary(
        outcome=Outcome(1, "finished", "all 200 steps", 200, 1600),
        folder=RunFolder(Path("runs/quickstart")),
        total_steps=200,
        first_loss=7.63,
        last_loss=4.21,
        vocab_size=2048,
        unigram_entropy=6.02,
        val_losses={"val_loss": 4.3, "val_loss/code": 3.9},
        tokens=204_800,
        tokens_per_s=2345.0,
        wall_s=87.0,
        checkpoint="runs/quickstart/checkpoints/step_0000200",
        wandb_place="offline in runs/quickstart/wandb",
    )
    lines = summary(run).splitlines()
    texts = {" ".join(line.split()) for line in lines}
    assert {
        "loss 7.6300 → 4.2100",
        "held-out loss 4.3000",
        "held-out loss code 3.9000",
        "trained on 205k tokens in 1:27",
    } <= texts
    assert any(text.startswith("ln(vocab) 7.6246") for text in texts)
    assert "  phalanx resume runs/quickstart run.steps=400   # train on" in lines
    failed = RunSummary(Outcome(1, "failed", "ValueError", 3, 24), RunFolder(tmp_path), 200)
    assert "phalanx logs" in summary(failed) and "held-out" not in summary(failed)
