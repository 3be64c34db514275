"""What people look at never holds a run up: paused terminals, unread pipes, readers that go away."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.run.folder import RunFolder
from tests.launch.local.test_local import CONFIG, LAUNCHER, PROGRAM, ROOT, wait_until


def start(folder: Path, out: int, plan: str = "{}", term: str = "xterm") -> subprocess.Popen[bytes]:
    (folder / "c.yaml").write_text(CONFIG % 1)
    env = {**os.environ, "PYTHONPATH": ROOT, "RANK_PLAN": plan, "TERM": term}
    command = [sys.executable, "-c", LAUNCHER, PROGRAM, "launch", "c.yaml"]
    return subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE)


def read_for(descriptor: int, done: Callable[[], bool]) -> str:
    """All that comes until `done`, and what is left then."""
    pieces = []
    while True:
        is_last = done()
        while select.select([descriptor], [], [], 0.1)[0]:
            try:
                piece = os.read(descriptor, 1 << 16)
            except OSError:
                piece = b""
            if not piece:
                return b"".join(pieces).decode()
            pieces.append(piece)
        if is_last:
            return b"".join(pieces).decode()


def plain(text: str) -> str:
    """Without the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")


def test_an_unread_pipe_stops_nothing(tmp_path: Path) -> None:
    """As `launch | less` without a key pressed: training goes on, a signal reaches the ranks, and the reader gets all of it."""
    reader, writer = os.pipe()
    plan = '{"steps": 4000, "pause_s": 0.01, "chatter": 20000}'
    process = start(tmp_path, writer, plan)
    os.close(writer)
    run = RunFolder(tmp_path / "runs" / "run")
    # The pipe holds 64 KiB: three steps' chatter. Steps go on far beyond that.
    wait_until(lambda: run.metrics.exists() and '"step": 40,' in run.metrics.read_text())
    process.send_signal(signal.SIGINT)
    wait_until(lambda: (outcome := run.read_outcome()) is not None and outcome.state == "stopped")
    shown = read_for(reader, lambda: process.poll() is not None)
    assert process.wait(30) == 130
    log = (run.log_dir(1) / "rank_0.log").read_text()
    assert shown == log and len(log) > 500_000
    os.close(reader)


def test_a_terminal_shows_a_bar_and_the_logs_other_lines(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))
    process = start(tmp_path, slave, '{"steps": 5, "pause_s": 0.3, "console": true, "last_words": "run folder  here"}')
    os.close(slave)
    shown = plain(read_for(master, lambda: process.poll() is not None))
    assert process.wait(30) == 0
    assert "5/5" in shown and "step 3/5  " not in shown
    assert shown.rstrip().endswith("run folder  here")
    frames = [line for line in re.split(r"[\r\n]+", shown) if "/5 " in line]
    assert frames and all(130 < len(frame.rstrip()) <= 140 for frame in frames)
    os.close(master)


def test_a_terminal_without_cursor_movement_shows_plain_lines(tmp_path: Path) -> None:
    """TERM=dumb, as in an editor's shell: a bar could only be drawn once, at the end."""
    master, slave = pty.openpty()
    process = start(tmp_path, slave, '{"steps": 3, "console": true, "last_words": "run folder  here"}', term="dumb")
    os.close(slave)
    shown = read_for(master, lambda: process.poll() is not None)
    assert process.wait(30) == 0
    assert "step 2/3  loss 1\r\n" in shown and shown.rstrip().endswith("run folder  here") and "\x1b" not in shown
    os.close(master)


@pytest.mark.prove
def test_a_paused_terminal_stops_nothing(tmp_path: Path) -> None:
    """Ctrl-S: nobody takes what is written, and the run finishes all the same; Ctrl-Q shows how it ended."""
    master, slave = pty.openpty()
    plan = '{"steps": 60, "pause_s": 0.01, "chatter": 3000, "console": true, "last_words": "the end"}'
    process = start(tmp_path, slave, plan)
    os.close(slave)
    run = RunFolder(tmp_path / "runs" / "run")
    wait_until(run.done.exists)
    shown = plain(read_for(master, lambda: process.poll() is not None))
    assert process.wait(30) == 0 and shown.rstrip().endswith("the end")
    os.close(master)


def test_a_reader_that_goes_away_is_given_up(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = start(tmp_path, writer, '{"steps": 30, "pause_s": 0.01, "chatter": 20000}')
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    assert process.wait(60) == 0
    assert RunFolder(tmp_path / "runs" / "run").done.exists()


def test_closed_standard_streams(tmp_path: Path) -> None:
    """`launch >&- 2>&- <&-`: the ranks' logs and the record hold everything."""
    (tmp_path / "c.yaml").write_text(CONFIG % 1)
    env = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", LAUNCHER, PROGRAM, "launch", "c.yaml"]
    script = " ".join(f"'{word}'" for word in command) + " >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env).returncode == 0
    run = RunFolder(tmp_path / "runs" / "run")
    assert run.done.exists() and "step 3" in (run.log_dir(1) / "rank_0.log").read_text()
