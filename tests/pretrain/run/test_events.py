"""events.jsonl: several writers, one line each, whatever a crash of one of them left."""

from __future__ import annotations

import fcntl
import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from pretrain.run import events
from pretrain.run.events import append_event, mend_events
from pretrain.run.files import iterate_lines
from pretrain.run.folder import RunFolder


def _write(path: str, writer: int) -> None:
    for number in range(50):
        append_event(RunFolder(Path(path)), writer, "test", number=number, filler="x" * 200)
        if number % 10 == writer:
            # A crash of somebody in the middle of a line.
            with open(Path(path) / "events.jsonl", "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(b'{"torn": ')


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = get_context("fork")
    writers = [context.Process(target=_write, args=(str(tmp_path), writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    mend_events(RunFolder(tmp_path))
    rows = [row for _, row in iterate_lines(tmp_path / "events.jsonl")]
    assert None not in rows
    for writer in range(4):
        assert [row["number"] for row in rows if row and row["attempt"] == writer] == list(range(50))


def test_a_stopped_holder_of_the_lock_does_not_stop_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PATIENCE_S", 0.1)
    folder = RunFolder(tmp_path)
    held = os.open(folder.events, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    append_event(folder, 1, "hung")
    os.close(held)
    assert [row["kind"] for _, row in iterate_lines(folder.events) if row] == ["hung"]
