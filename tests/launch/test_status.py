"""`phalanx status`: any folder gets its line, events are sentences, and a terminal is redrawn in place."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from launch.event_words import clock, sentence
from launch.run_list import list_runs
from launch.status import LIVE_STATES, RunStatus, as_json, read_status
from launch.status_text import describe, table
from launch.status_watch import watch
from pretrain.run.event_rows import is_event
from pretrain.run.events import EVENTS, EventKind
from pretrain.run.folder import STATES, RunFolder
from tests.launch.broken_folders import BROKEN, ENDED, make_run
from tools.cli import run as phalanx


def test_each_broken_folder_is_one_line_and_none_hides_another(tmp_path: Path) -> None:
    for name, (spoil, _) in BROKEN.items():
        spoil(make_run(tmp_path / name))
    (tmp_path / "empty").mkdir()
    (tmp_path / "another tool's" / "src").mkdir(parents=True)
    (tmp_path / "a file").write_text("")
    header, *lines = table(list_runs(tmp_path), None)
    assert header.split() == ["RUN", "STATE", "STEP", "LOSS", "AGE", "WHY"]
    assert len(lines) == len(BROKEN)
    for name, (_, said) in BROKEN.items():
        (line,) = [line for line in lines if line.startswith(str(tmp_path / name) + " ")]
        assert said in line, line
    assert len(json.loads(as_json(list_runs(tmp_path)), parse_constant=pytest.fail)) == len(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_the_status_of_a_broken_folder_has_no_traceback(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    BROKEN[name][0](make_run(tmp_path / "run"))
    status = phalanx(["status", str(tmp_path / "run")])
    told = capfd.readouterr()
    assert status in (0, 2) and "Traceback" not in told.err, told.err
    assert told.out if status == 0 else "RUN_DIR" in told.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_somebody_else_is_one_line(open_folder: Path) -> None:
    """umask 077: its owner alone may look into the folder."""
    make_run(open_folder / "mine")
    for name, mode in (("folder", 0o700), ("files", 0o755)):
        run = make_run(open_folder / name)
        (run / "metrics.jsonl").chmod(0o600)
        run.chmod(mode)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.write(writer, "\n".join(table(list_runs(open_folder), None)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        lines = file.read().splitlines()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    told = [line for line in lines if "unreadable" in line and "Permission denied" in line]
    assert len(lines) == 4 and len(told) == 2, lines


def status_of(path: Path, **changed: Any) -> RunStatus:
    run = read_status(RunFolder(make_run(path)))
    return RunStatus(**(run.as_dict() | changed))


def test_columns_align_whatever_the_names(tmp_path: Path) -> None:
    names = ["a", "名前の長い実験", "emoji-🚀", "tab\tand\x1b[31m colour"]
    runs = [status_of(tmp_path / str(index), run_dir=name, why="because") for index, name in enumerate(names)]
    assert "\x1b" not in describe(runs[-1])
    lines = table(runs, None)
    starts = {cell_len(line[: line.index(word)]) for line, word in zip(lines, ["STATE", *["died"] * 4], strict=True)}
    assert len(starts) == 1
    assert all(char.isprintable() for line in lines for char in line)
    assert all(cell_len(line) <= 40 for line in table(runs, 40))
    long = table([*runs, status_of(tmp_path / "long", run_dir="n" * 250, why="because")], 80)
    assert all(cell_len(line) <= 80 and "died" in line and "7/10  2.5000" in line for line in long[1:]) and "WHY" in long[0]
    assert any(line.endswith("…") for line in table(runs, 40))


def test_the_run_that_was_seen_last_comes_first(tmp_path: Path) -> None:
    for name, age_s in (("old", 5000), ("new", 60), ("oldest", 100_000)):
        for path in (run := make_run(tmp_path / name)).iterdir():
            os.utime(path, (time.time() - age_s, time.time() - age_s))
        os.utime(run, (time.time() - age_s, time.time() - age_s))
    lines = table(list_runs(tmp_path), None)
    assert [Path(line.split()[0]).name for line in lines[1:]] == ["new", "old", "oldest"]
    assert " 1:00 " in lines[1] and " 1:23:20 " in lines[2]


def example(kind: EventKind) -> dict[str, Any]:
    values = {"integer": 3, "number": 1.5, "string": "text", "boolean": True, "object": {"a": 1}}
    values |= {"list of integers": [1, 2], "list of strings": ["n1", "n2"], "list of objects": [{"rank": 1}]}
    fields = {
        field.name: values[field.type.partition(",")[0].removesuffix(" or null")]
        for field in EVENTS[kind].fields
        if not field.optional
    }
    return {"time": 1.0e9, "attempt": 2, "kind": str(kind), **fields}


@pytest.mark.parametrize("kind", list(EventKind))
def test_each_event_is_a_sentence(kind: EventKind) -> None:
    row = example(kind)
    assert is_event(row)
    assert not any(mark in sentence(row) for mark in ("=", "{", "[", "None")), sentence(row)
    for name in row.keys() - {"time", "attempt", "kind"}:
        assert not is_event({**row, name: object()}), name
    assert not is_event({key: value for key, value in row.items() if key != "time"})


def test_events_have_times_of_day(tmp_path: Path) -> None:
    now_s = time.mktime((2026, 3, 5, 14, 0, 0, 0, 0, -1))
    assert clock(now_s - 60, now_s) == "13:59:00"
    assert clock(now_s - 86400, now_s) == "2026-03-04 14:00:00"
    assert clock(4e18, now_s) == "?"
    text = describe(status_of(tmp_path / "run", events=[{**ENDED, "time": now_s - 60}]), now_s)
    assert "events    13:59:00  the attempt ended, crashed, on n1: rank 1 (5 steps more are saved)" in text


class Terminal:
    """A pseudo-terminal of a given width, and what was written to it."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.out = os.fdopen(slave, "w")

    def text(self) -> str:
        self.out.flush()
        os.set_blocking(self.master, False)
        found = b""
        while True:
            try:
                found += os.read(self.master, 65536)
            except BlockingIOError:
                return found.decode()


def looks(texts: list[str]) -> Callable[[int | None], tuple[str, bool]]:
    waiting = list(texts)
    return lambda columns: (waiting.pop(0), bool(waiting))


def test_a_terminal_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(60)
    watch(looks(["step 1\nsecond " + "long " * 40, "step 2\nsecond"]), 0.0, terminal.out, redraw=True)
    text = terminal.text()
    first = text.partition("step 2")[0]
    assert "\x1b[1A" in first and "\x1b[2K" in first, "the cursor goes back up, and the lines are cleared"
    assert first.count("\n") == 1 and "…" in first, "a line that is wider than the window is cut, not wrapped"


@pytest.mark.parametrize("texts", [["a", "a", "b"]])
def test_a_pipe_gets_each_change_once(texts: list[str]) -> None:
    out = io.StringIO()
    watch(looks(texts), 0.0, out, redraw=True)
    assert out.getvalue() == "a\n\nb\n"


def test_live_states_are_no_outcomes() -> None:
    assert not set(LIVE_STATES) & set(STATES)


def test_a_status_is_a_mapping_of_known_names(tmp_path: Path) -> None:
    document: Mapping[str, Any] = read_status(RunFolder(make_run(tmp_path / "run"))).as_dict()
    assert document["step"] == 7 and document["total_steps"] == 10 and document["damage"] == []
    assert 0 <= document["age_s"] < 60
