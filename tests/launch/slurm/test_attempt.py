"""What the batch step does with a file system that takes no rows, and with a signal that no attempt has taken."""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Config
from launch import disk_wait
from launch.slurm.attempt import JobContext
from launch.slurm.clock import TimeLimitClock
from launch.slurm.job_file import make_job_file
from pretrain.run.events import EventKind
from pretrain.run.folder import RunFolder


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobContext:
    """Of a run folder whose events go to a full device."""
    monkeypatch.setattr(disk_wait, "POLL_S", 0.02)
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    nothing: Any = None
    job = make_job_file(Config(), tmp_path, 5, [1])
    return JobContext(tmp_path, job, 7, 0, ["srun"], {}, [], nothing, nothing, nothing)


def test_an_event_waits_for_room(context: JobContext, capsys: pytest.CaptureFixture[str]) -> None:
    events = RunFolder(Path(context.spec.run_dir)).events

    def clear() -> None:
        time.sleep(0.2)
        events.unlink()

    thread = threading.Thread(target=clear)
    thread.start()
    context.record(1, EventKind.JOB_OVER, state="finished", exit_code=0, why="so")
    thread.join()
    assert [json.loads(line)["kind"] for line in events.read_text().splitlines()] == ["job_over"]
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_waiting_for_a_disk_ends(context: JobContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_wait, "PATIENCE_S", 0.1)
    with pytest.raises(OSError, match="No space left"):
        context.record(1, EventKind.JOB_OVER, state="finished", exit_code=0, why="so")


@pytest.mark.parametrize(
    ("number", "restarts", "ends"),
    [(signal.SIGINT, 1, True), (signal.SIGTERM, 0, True), (signal.SIGTERM, 1, False), (signal.SIGUSR1, 0, False)],
)
def test_a_signal_after_the_last_attempt_ends_the_run_unless_it_is_slurms(
    context: JobContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, restarts: int, ends: bool
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho JobId=7 Restarts={restarts}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    clock = TimeLimitClock(RunFolder(tmp_path / "other"), 7, 60.0, {})
    assert replace(context, clock=clock, waiting=[number]).is_ended_by_user() == ends
