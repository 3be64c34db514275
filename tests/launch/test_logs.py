"""`phalanx logs`: a queued run is waited for, a run that is over is left, and no log is too large."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import logs
from launch.commands import main
from launch.status import read_status
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.files import write_json
from pretrain.run.folder import RunFolder
from pretrain.run.process import process_start_ticks

ROOT = Path(__file__).resolve().parents[2]
SIZE, MOST_MIB = 1 << 28, 150
Until = Callable[[str], None]


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that waits in Slurm's queue, seen from a host without Slurm's commands."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("POLL_S", "QUEUE_POLL_S"):
        monkeypatch.setattr(logs, name, 0.02)
    monkeypatch.setattr(logs, "SLURM_POLL_S", 0.1)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    append_event(folder, 0, EventKind.JOB_SUBMITTED, jobs=[17])
    return folder


def begin(folder: RunFolder, attempt: int, text: str) -> None:
    append_event(folder, attempt, EventKind.JOB_ATTEMPT, nodes=["n1"], logs="", job=17, restarts=0, step_before=0)
    folder.log_dir(attempt).mkdir(parents=True)
    (folder.log_dir(attempt) / "rank_0.log").write_text(text)


def over(folder: RunFolder, attempt: int) -> None:
    append_event(folder, attempt, EventKind.JOB_OVER, state="finished", exit_code=0, why="finished at step 3")


def follow(folder: RunFolder, live: Callable[[Until], None] = lambda _: None) -> tuple[str, str]:
    """What is shown, and the notes beside it. `live` runs meanwhile; it waits until a text is among both."""
    out, notes = io.StringIO(), io.StringIO()

    def until(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in out.getvalue() + notes.getvalue():
            assert time.monotonic() < deadline, f"{text} is not shown"
            time.sleep(0.02)

    thread = threading.Thread(target=live, args=(until,))
    thread.start()
    logs.print_rank_log(folder, 0, None, True, out, notes)
    thread.join()
    return out.getvalue(), notes.getvalue()


def test_a_queued_run_is_waited_for_and_followed_to_its_end(queued: RunFolder) -> None:
    def live(until: Until) -> None:
        until("no log yet")
        begin(queued, 1, "first\n")
        until("first")
        begin(queued, 2, "second\n")
        until("second")
        over(queued, 2)

    out, notes = follow(queued, live)
    assert out.splitlines() == ["first", f"--- {queued.log_dir(2) / 'rank_0.log'}", "second"]
    assert "no log yet: the run is queued" in notes and "waiting for the next one" in notes


def test_a_run_that_is_over_is_not_waited_for(queued: RunFolder) -> None:
    begin(queued, 1, "all\n")
    over(queued, 1)
    assert follow(queued) == ("all\n", "")


def test_a_run_that_ended_in_the_queue_shows_the_output_of_its_job(queued: RunFolder) -> None:
    (queued.path / "logs").mkdir()
    (queued.path / "logs" / "slurm-17.out").write_text("no such partition\n")
    over(queued, 0)
    out, notes = follow(queued)
    assert "no such partition" in out and not notes


# The peak of a process counts the memory of the process that forked it: this one is small.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10, file=sys.stderr)
sys.exit(code)
"""


def peak_mib(*words: str) -> tuple[int, bytes]:
    """(peak memory of `phalanx words` in MiB, what it printed)."""
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "tools.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return int(done.stderr.split()[-1]), done.stdout


@pytest.mark.parametrize("words", [(), ("-f",), ("--rank", "all")])
@pytest.mark.parametrize("name", ["rank_0.log", "n1.log"])
def test_a_log_of_gigabytes_takes_little_memory(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """A line of 256 MiB without end, and the lines that matter behind it. The file has holes: it takes no room on the disk."""
    folder = RunFolder(tmp_path / "run")
    folder.log_dir(1).mkdir(parents=True)
    folder.config.write_text("run: {name: a}\n")
    log = folder.log_dir(1) / name
    with log.open("wb") as file:
        file.truncate(SIZE)
        file.seek(SIZE)
        file.write(b"\n[rank 0] the end\n")
    mib, text = peak_mib("logs", str(folder.path), *words)
    assert text.endswith(b"the end\n")
    assert mib < MOST_MIB
    assert len(text) < 1 << 20


def test_a_run_that_was_just_launched_here_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's log is there before those of the ranks, and a rank's log before rank 0 holds the run folder."""
    for name in ("POLL_S", "QUEUE_POLL_S"):
        monkeypatch.setattr(logs, name, 0.02)
    folder, pid = RunFolder(tmp_path / "run"), os.getpid()
    for path in (folder.log_dir(1), folder.launch_dir(1)):
        path.mkdir(parents=True)
    launcher = {"host": socket.gethostname(), "pid": pid, "start_ticks": process_start_ticks(pid)}
    (folder.launch_dir(1) / "launcher.json").write_text(json.dumps(launcher))
    (folder.log_dir(1) / "torchrun.log").write_text("torchrun's own\n")

    def live(until: Until) -> None:
        until("no log yet")
        with (folder.log_dir(1) / "rank_0.log").open("w") as log:
            log.write("first\n")
            log.flush()
            until("first")
            log.write("last\n")
        outcome = {"attempt": 1, "state": "finished", "why": "", "step": 3, "consumed_samples": 3}
        write_json(folder.outcome, outcome)

    out, notes = follow(folder, live)
    assert out == "first\nlast\n" and "no log yet: the run is starting" in notes


def test_one_rank_is_followed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["logs", "runs/a", "--rank", "all", "-f"])
    assert "--follow shows the log of one rank" in capsys.readouterr().err


def test_a_job_that_slurm_has_forgotten_is_not_waited_for(queued: RunFolder, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    squeue.chmod(0o755)
    begin(queued, 1, "all\n")
    assert follow(queued) == ("all\n", "")
    status = read_status(queued)
    assert status.state == "died" and "Slurm no longer knows job 17; its last event was running" in status.why
