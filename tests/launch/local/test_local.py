"""The local launcher: logs a rank, the first failure first, one exit code, and no process left, whoever dies how."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.own_packages import STARTER
from launch.local.parent_guard import MARK_NAME, marked_pids
from launch.status import read_status
from launch.watch.failures import find_failures
from launch.watch.processes import FORK_SERVER, STANDBY, children_of, name_of, ranks_of
from pretrain.run.files import iterate_lines
from pretrain.run.folder import RunFolder
from pretrain.run.lock import live_holder
from tests.tmpfs import mounted_tmpfs

# The launcher by itself, which looks at no data, with the tests' own rank program, in a process of its own: it installs signal
# handlers.
LAUNCHER = """
import os, sys
import launch.commands as cli
import launch.start
from launch.plan import make_plan
program = sys.argv[1]
cli.make_plan = lambda config, source, overrides, environ: make_plan(config, source, overrides, environ, program=program)
from pretrain.preflight.verdict import preflight
launch.start.preflight = lambda config, with_data: preflight(config, with_data=False)
from tools.cli import main
sys.argv = ["phalanx", *sys.argv[2:]]
sys.exit(main())
"""
PROGRAM = str(Path(__file__).resolve().parents[1] / "rank_program.py")
ROOT = str(Path(__file__).resolve().parents[3])
CONFIG = """
run: {steps: 5}
model: {vocab_size: 256}
data: {tokenizer: {path: t.model}, train: [{path: x}]}
launch: {processes_per_node: %d}
batch: {global_batch_seqs: 8}
"""


class Launch:
    """One `phalanx` process in a folder of its own."""

    def __init__(self, folder: Path, words: list[str], plan: dict[str, Any], ranks: int, **env: str) -> None:
        self.run = RunFolder(folder / "runs" / "run")
        (folder / "c.yaml").write_text(CONFIG % ranks)
        environ = {**os.environ, "RANK_PLAN": json.dumps(plan), "PYTHONPATH": ROOT, **env}
        command = [sys.executable, "-c", LAUNCHER, PROGRAM, *words]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=90)
        return self.process.returncode, out, err

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.run.metrics.exists() and f'"step": {step},' in self.run.metrics.read_text())

    def mark(self) -> str:
        return json.loads((self.run.launch_dir(1) / "launcher.json").read_text())["mark"]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Launch]:
    def make(*words: str, plan: dict[str, Any] | None = None, ranks: int = 2, **env: str) -> Launch:
        return Launch(tmp_path, list(words) or ["launch", "c.yaml"], plan or {}, ranks, **env)

    return make


def wait_until(true: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it didn't come true in time"
        time.sleep(0.05)


def test_a_run_that_finishes(start: Callable[..., Launch]) -> None:
    launch = start()
    code, out, err = launch.end()
    assert code == 0, err
    assert out.splitlines() == ["step 1", "step 2", "step 3"]
    logs = launch.run.log_dir(1)
    assert sorted(path.name for path in logs.iterdir()) == ["rank_0.log", "rank_1.log", "torchrun.log"]
    assert launch.run.done.exists() and "launch.torchrun" in (launch.run.launch_dir(1) / "command.sh").read_text()
    (event,) = [row for _, row in iterate_lines(launch.run.events) if row and row["kind"] == "attempt"]
    assert event["attempt"] == 1 and event["logs"] == str(logs.resolve())


def test_json_is_alone_on_stdout(start: Callable[..., Launch]) -> None:
    code, out, err = start("launch", "c.yaml", "--json").end()
    document = json.loads(out)
    assert code == 0 and document["state"] == "finished" and document["outcome"]["step"] == 3 and "step 3" in err


def test_the_first_failing_ranks_traceback_comes_first(start: Callable[..., Launch]) -> None:
    """Rank 1 fails at step 2, rank 0 at step 30: rank 1 is the cause, and rank 0's traceback isn't shown."""
    launch = start(plan={"steps": 100, "pause_s": 0.05, "raise": {"1": 2, "0": 30}})
    code, out, err = launch.end()
    assert code == 1
    assert err.index("rank 1 failed first") < err.index("ValueError: rank 1 can't go on")
    assert "Traceback" not in out
    assert next(failure.rank for failure in find_failures(launch.run.log_dir(1))) == 1


def test_a_killed_rank_is_the_first_cause(start: Callable[..., Launch]) -> None:
    code, _, err = start(plan={"steps": 100, "pause_s": 0.05, "kill": {"1": 3}, "raise": {"0": 4}}).end()
    assert code == 1 and "rank 1 failed first:\nkilled by signal 9 (SIGKILL)" in err


@pytest.mark.prove
def test_restarts_end_where_they_change_nothing(start: Callable[..., Launch]) -> None:
    launch = start("launch", "c.yaml", "launch.restart.max_local=5", plan={"steps": 100, "pause_s": 0.05, "raise": {"1": 2}})
    code, _, err = launch.end()
    assert code == 1 and "restart 1 of at most 5" in err and "no restart: 2 attempts in a row" in err, err
    assert err.count("ValueError: rank 1 can't go on") == 2 and sorted(launch.run.claimed_attempts()) == [1, 2]


def test_a_restart_finds_torchrun_waiting_and_leaves_none(start: Callable[..., Launch]) -> None:
    launch = start(
        *("launch", "c.yaml", "launch.restart.max_local=5", "launch.restart.standby_after_s=0"),
        plan={"steps": 1000, "pause_s": 0.05},
        ranks=1,
    )

    def waiting() -> list[int]:
        return [pid for pid in children_of(launch.process.pid) if name_of(pid) == STANDBY]

    def rank() -> int:
        below = [pid for child in children_of(launch.process.pid) for pid in ranks_of(child)]
        return next((pid for pid in below if name_of(pid) == "rank 0"), 0)

    seen = []
    for attempt in (1, 2):
        wait_until(lambda number=attempt: launch.run.last_attempt() == number and bool(rank()) and len(waiting()) == 1)
        seen += waiting()
        os.kill(rank(), signal.SIGKILL)
    code, _, err = launch.end()
    assert code == 1 and "restart 1 of at most 5" in err and "no restart: 2 attempts in a row" in err, err
    marks = [json.loads((launch.run.launch_dir(number) / "launcher.json").read_text())["mark"] for number in (1, 2)]
    assert len(set(seen)) == len(set(marks)) == 2 and not any(map(name_of, seen)) and not any(map(marked_pids, marks))
    assert "exitcode  : -9 (pid" in (launch.run.log_dir(2) / "torchrun.log").read_text()


def test_a_signal_while_a_killed_attempt_is_cleared_up_counts(start: Callable[..., Launch]) -> None:
    """The copy to W&B outlives its rank for some seconds."""
    words = ("launch", "c.yaml", "launch.restart.max_local=5", "launch.restart.standby_after_s=null")
    launch = start(*words, plan={"steps": 1000, "pause_s": 0.05}, ranks=1)
    launch.wait_for_step(2)
    mark = launch.mark()
    (agent,) = [pid for pid in children_of(launch.process.pid) if ranks_of(pid)]
    copy = subprocess.Popen(["sleep", "100"], env={MARK_NAME: mark})
    os.kill(_pid_of("rank 0", launch, mark), signal.SIGKILL)
    wait_until(lambda: not name_of(agent))
    launch.process.send_signal(signal.SIGINT)
    copy.kill()
    copy.wait()
    code, _, err = launch.end()
    assert code == 130 and "SIGINT: no other attempt starts" in err and launch.run.claimed_attempts() == [1], err


def test_bad_input_and_an_interrupted_run_are_not_started_again(start: Callable[..., Launch]) -> None:
    launch = start("launch", "c.yaml", "launch.restart.max_local=5", plan={"refuse": True})
    assert launch.end()[0] == 2 and launch.run.claimed_attempts() == [1]
    again = start("launch", "c.yaml", "launch.restart.max_local=5", plan={"steps": 1000, "raise": {"1": 600}, "pause_s": 0.1})
    again.wait_for_step(3)
    again.process.send_signal(signal.SIGINT)
    assert again.end()[0] == 130 and sorted(again.run.claimed_attempts()) == [1, 2]


def test_a_rank_that_hangs_after_the_end_does_not_undo_it(start: Callable[..., Launch]) -> None:
    plan = {"steps": 3, "linger": {"1": True}}
    launch = start("launch", "c.yaml", "launch.watch.step_timeout_s=4", "launch.watch.stacks=false", plan=plan)
    code, _, err = launch.end()
    outcome = launch.run.read_outcome()
    assert code == 0 and outcome is not None and outcome.state == "finished", err
    assert marked_pids(launch.mark()) == []


def test_bad_input_found_by_a_rank_is_exit_2(start: Callable[..., Launch]) -> None:
    code, _, err = start(plan={"refuse": True}).end()
    assert code == 2 and "there must be something to learn from" in err and "Traceback" not in err


def test_bad_config_starts_nothing(start: Callable[..., Launch]) -> None:
    launch = start("launch", "c.yaml", "parallel.tensor=3", "batch.global_batch_seqs=7")
    code, _, err = launch.end()
    assert code == 2 and "problem" in err and not launch.run.path.exists()


def test_a_refused_run_folder_is_exit_2(start: Callable[..., Launch], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    code, _, err = start("launch", "c.yaml", "run.dir=notes").end()
    assert code == 2 and "holds todo.txt" in err and os.listdir(tmp_path / "notes") == ["todo.txt"]


# tests/run/test_kills.py sends SIGTERM every day.
@pytest.mark.parametrize(
    ("number", "code", "state"),
    [(signal.SIGINT, 130, "stopped"), pytest.param(signal.SIGTERM, 75, "preempted", marks=pytest.mark.prove)],
)
def test_a_signal_stops_the_run_with_an_outcome(
    start: Callable[..., Launch], number: signal.Signals, code: int, state: str
) -> None:
    launch = start(plan={"steps": 1000, "pause_s": 0.05})
    launch.wait_for_step(3)
    launch.process.send_signal(number)
    launch.process.send_signal(number)
    found, _, err = launch.end()
    outcome = launch.run.read_outcome()
    assert found == code and outcome is not None and outcome.state == state and outcome.why == number.name, err
    assert not launch.run.done.exists() and marked_pids(launch.mark()) == []


@pytest.mark.parametrize("children", [0, 2], ids=["before torchrun", "before the ranks"])
def test_a_signal_before_the_ranks_are_there(start: Callable[..., Launch], children: int) -> None:
    """The two children are the guard and torchrun."""
    launch = start()
    wait_until(lambda: (launch.run.launch_dir(1) / "launcher.json").exists())
    wait_until(lambda: len(children_of(launch.process.pid)) >= children)
    launch.process.send_signal(signal.SIGTERM)
    code, _, err = launch.end()
    assert code == 75, err
    assert marked_pids(launch.mark()) == []


# tests/run/test_kills.py kills the launcher, torchrun's agent and ranks of whole runs every day.
@pytest.mark.parametrize(
    "victim",
    [FORK_SERVER, *(pytest.param(who, marks=pytest.mark.prove) for who in ("launcher", "agent", "rank 0", "rank 1"))],
)
def test_no_orphans_after_sigkill(start: Callable[..., Launch], victim: str) -> None:
    """Whoever is killed: no process stays, and the next launch begins at once as the next attempt."""
    launch = start(plan={"steps": 1000, "pause_s": 0.05})
    launch.wait_for_step(2)
    mark = launch.mark()
    os.kill(_pid_of(victim, launch, mark), signal.SIGKILL)
    code, _, err = launch.end()
    assert code == (-signal.SIGKILL if victim == "launcher" else 1)
    if victim == FORK_SERVER:
        assert "failed first:\nthe process that this machine's ranks are forked from was killed by signal 9 (Killed)" in err
    wait_until(lambda: marked_pids(mark) == [], timeout_s=60.0)
    assert live_holder(launch.run) is None
    # torchrun ends rank 0 with SIGTERM when rank 1 is gone; without collectives, these ranks obey it and say so.
    assert (launch.run.read_outcome() is None) == (victim != "rank 1")
    assert read_status(launch.run).state == ("preempted" if victim == "rank 1" else "died")
    again = start(plan={"steps": 2, "pause_s": 0.0})
    assert again.end()[0] == 0
    assert launch.run.last_attempt() == 2


def test_resume_and_status_and_logs_and_cancel(start: Callable[..., Launch]) -> None:
    """The life of a run through the commands; a second launcher beside it is refused."""
    first = start(plan={"steps": 1000, "pause_s": 0.05})
    first.wait_for_step(2)
    code, _, err = start().end()
    assert code == 2 and "one live attempt a run folder; it is held by attempt 1" in err
    code, out, _ = start("status", "runs/run", "--json").end()
    status = json.loads(out)
    assert code == 0 and status["state"] == "running" and status["attempt"] == 1 and status["step"] >= 2
    assert status["total_steps"] == 5 and status["loss"] == pytest.approx(5.0 / status["step"])
    code, out, _ = start("cancel", "runs/run").end()
    assert code == 0 and out.startswith("stopped at step")
    assert first.end()[0] == 130
    code, out, _ = start("logs", "runs/run", "--rank", "0").end()
    assert code == 0 and "step 2" in out
    code, out, err = start("cancel", "runs/run").end()
    assert code == 0 and "nothing to cancel" in out
    code, _, err = start("resume", "runs/run", "run.seed=7", plan={"steps": 3}).end()
    assert code == 0, err
    assert "seed: 7" in first.run.config.read_text() and first.run.last_attempt() == 2
    _, out, _ = start("status", "runs/run").end()
    assert "state    finished: all steps done" in out and "attempt  2" in out


def test_cancel_of_a_run_started_by_hand(start: Callable[..., Launch], tmp_path: Path) -> None:
    """No launcher: rank 0, which holds the folder, is asked; the dry run's line is what is typed."""
    _, line, _ = start("launch", "c.yaml", "--dry-run", ranks=1).end()
    env = {**os.environ, "RANK_PLAN": json.dumps({"steps": 1000, "pause_s": 0.05}), "PYTHONPATH": ROOT}
    by_hand = subprocess.Popen(["bash", "-c", f"exec env {line}"], cwd=tmp_path, env=env, stdout=subprocess.PIPE)
    run = RunFolder(tmp_path / "runs" / "run")
    wait_until(lambda: run.metrics.exists() and '"step": 2,' in run.metrics.read_text())
    code, out, _ = start("cancel", "runs/run").end()
    assert code == 0 and out.startswith("stopped at step")
    by_hand.communicate(timeout=30)


def test_two_machines_by_hand(start: Callable[..., Launch], tmp_path: Path) -> None:
    """Two agents on loopback run the line that the dry run prints, HOST replaced."""
    port = str(_free_port())
    words = ["launch", "c.yaml", "--dry-run", "launch.nodes=2", f"launch.master_port={port}"]
    _, text, _ = start(*words, ranks=1).end()
    line = text.splitlines()[-1].replace("HOST", "127.0.0.1")
    env = {**os.environ, "RANK_PLAN": json.dumps({"steps": 3}), "PYTHONPATH": ROOT, "PHALANX_LOG_DIR": str(tmp_path / "logs")}
    agents = [
        subprocess.Popen(["bash", "-c", f"exec env {line}"], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) for _ in "12"
    ]
    assert [agent.wait(60) for agent in agents] == [0, 0]
    outcome = RunFolder(tmp_path / "runs" / "run").read_outcome()
    assert outcome is not None and outcome.state == "finished"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]


def test_dry_run_starts_nothing(start: Callable[..., Launch]) -> None:
    launch = start("launch", "c.yaml", "--dry-run", "run.steps=7")
    code, out, _ = launch.end()
    assert code == 0 and out.count("\n") == 1 and out.endswith("--config c.yaml run.steps=7\n")
    assert not launch.run.path.exists()
    code, out, _ = start("launch", "c.yaml", "--dry-run", "--json").end()
    assert json.loads(out)["command"][1:4] == ["-P", STARTER, "launch.torchrun"]
    code, out, err = start("launch", "c.yaml", "--dry-run", "launch.target=slurm").end()
    assert code == 0 and out.startswith("#!/bin/bash\n") and "sbatch of this output alone ends at once" in err
    code, out, _ = start("launch", "c.yaml", "--dry-run", "launch.nodes=2").end()
    assert code == 0 and "--rdzv-endpoint HOST:29500" in out
    code, _, err = start("launch", "c.yaml", "launch.nodes=2").end()
    assert code == 2 and "launch.nodes = 2" in err


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume"])
def test_a_folder_that_is_no_run(start: Callable[..., Launch], tmp_path: Path, command: str) -> None:
    (tmp_path / "other").mkdir()
    code, _, err = start(command, "other").end()
    assert code == 2 and "must be a run folder" in err and "Traceback" not in err


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _pid_of(victim: str, launch: Launch, mark: str) -> int:
    if victim == "launcher":
        return launch.process.pid
    for pid in marked_pids(mark):
        if name_of(pid) == victim or (victim == "agent" and any(name_of(child) == FORK_SERVER for child in children_of(pid))):
            return pid
    raise AssertionError(f"no process is {victim} among those with {MARK_NAME}={mark}")


@pytest.fixture
def full_folder(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", "4m") as folder:
        yield folder


def fill_and_crash(folder: Path) -> Launch:
    """A run with restarts whose rank raises at step 9, on a disk that is full by then. Returns once the restart waits."""
    plan = {"steps": 9, "pause_s": 0.2, "raise": {"0": 9}}
    launch = Launch(folder, ["launch", "c.yaml", "launch.restart.max_local=1", "launch.restart.standby_after_s=null"], plan, 1)
    launch.wait_for_step(2)
    with open(folder / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(b"x" * 65536)
    assert launch.process.stderr is not None
    for line in launch.process.stderr:
        if "the next attempt waits until the disk takes it, 10 minutes at most: " in line:
            assert "No space left on device" in line
            return launch
    raise AssertionError("the launcher did not wait")


def test_a_restart_waits_for_a_full_disk(full_folder: Path) -> None:
    launch = fill_and_crash(full_folder)
    assert launch.run.claimed_attempts() == [1]
    (full_folder / "filler").unlink()
    code, _, err = launch.end()
    assert code == 1 and "restart 1 of at most 1" in err and launch.run.claimed_attempts() == [1, 2], err


@pytest.mark.prove
def test_a_launcher_that_waits_for_a_disk_can_be_ended(full_folder: Path) -> None:
    launch = fill_and_crash(full_folder)
    launch.process.send_signal(signal.SIGTERM)
    code, _, err = launch.end()
    assert code == 75 and "SIGTERM: no other attempt starts" in err and launch.run.claimed_attempts() == [1], err
