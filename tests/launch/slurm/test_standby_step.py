"""The next attempt takes the step that waits for it, or nothing of that step is left: the node's agent, with a small torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from configs.own_packages import command
from configs.schema import Config
from launch.slurm import standby_step
from launch.slurm.standby_step import READY, StandbyStep
from launch.watch.heartbeats import make_watch_policy
from launch.watch.processes import STANDBY, name_of

ROOT = str(Path(__file__).resolve().parents[3])
TORCHRUN = """
import json, os, sys, time
from launch.standby import WAITS, wait_for_attempt
waited = WAITS in os.environ
if waited:
    wait_for_attempt(sys.argv[1], sys.argv[2:])
logs = os.environ["PHALANX_LOG_DIR"]
print(json.dumps([waited, sys.argv[2:], os.environ["PHALANX_ATTEMPT"], os.path.basename(logs)]), flush=True)
# The agent has seen that its torchrun has begun.
while not os.path.exists(os.path.join(logs, "nodes", "node7.json")):
    time.sleep(0.01)
"""
# srun for one node: it drops its first argument, which is --overlap.
SRUN = '#!/bin/sh\nshift\nexec "$@"\n'
ENVIRON = {**os.environ, "PYTHONPATH": ROOT, "SLURMD_NODENAME": "node7"}


class Job:
    """A batch step's view of the standby of its job, on node7."""

    def __init__(self, folder: Path, imports: str) -> None:
        self.folder = folder
        (folder / "program.py").write_text(imports)
        (folder / "srun").write_text(SRUN)
        (folder / "srun").chmod(0o755)
        agent = command(sys.executable, "launch.slurm.node_agent")
        places = ["--attempt-dir", "{attempt_dir}", "--log-dir", "{log_dir}", "--policy", make_watch_policy(Config()).to_json()]
        torchrun = [sys.executable, "-c", TORCHRUN, str(folder / "program.py"), "{attempt}"]
        words = [str(folder / "srun"), *agent, *places, "--", *torchrun]
        self.standby = StandbyStep(words, ENVIRON, 0.0)
        assert self.begin(1) is None
        self.standby.look()

    def begin(self, attempt: int, node: str = "node7") -> subprocess.Popen[bytes] | None:
        own = self.folder / f"attempt_{attempt}"
        filled = {"{nodes}": "1", "{node_file}": "-", "{attempt}": str(attempt), "{attempt_dir}": str(own), "{log_dir}": str(own)}
        return self.standby.begin([node], filled, {"PHALANX_ATTEMPT": str(attempt)})

    def processes(self) -> list[psutil.Process]:
        """The agent and its standby, whose words name the program. A cluster of other tests may live below this process too."""
        program = str(self.folder / "program.py")
        return [process for process in psutil.Process().children(recursive=True) if has_word(process, program)]

    def wait_until_ready(self) -> None:
        assert self.standby._all_say(READY, 30.0)


def has_word(process: psutil.Process, word: str) -> bool:
    """Whether `word` is among the words of the process. A process that is ending has none."""
    try:
        return word in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it didn't come true in time"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    made: list[Job] = []

    def make(imports: str) -> Job:
        made.append(Job(tmp_path, imports))
        return made[-1]

    yield make
    for job in made:
        for process in job.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_the_next_attempt_takes_the_waiting_step(start: Callable[[str], Job]) -> None:
    job = start("")
    job.wait_until_ready()
    step = job.begin(2)
    assert step is not None and step.wait(30) == 0
    log = (job.folder / "attempt_2" / "node7.torchrun.log").read_text()
    assert json.loads(log) == [True, ["2"], "2", "attempt_2"]
    assert not job.processes()


@pytest.mark.parametrize("what", ["elsewhere", "importing", "agent stopped", "standby killed", "step killed"])
def test_an_unusable_step_is_not_taken(start: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(standby_step, "_PATIENCE_S", 0.3 if what == "agent stopped" else 60.0)
    job = start("import time\ntime.sleep(60)" if what == "importing" else "")
    if what != "importing":
        job.wait_until_ready()
        agent, waiting = sorted(job.processes(), key=lambda process: name_of(process.pid) == STANDBY)
        killed = {"standby killed": waiting, "step killed": agent}.get(what)
        if killed is not None:
            killed.kill()
            wait_until(lambda: has_ended(killed))
        elif what == "agent stopped":
            agent.send_signal(signal.SIGSTOP)
    assert job.begin(2, node="node8" if what == "elsewhere" else "node7") is None
    for process in job.processes():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
    wait_until(lambda: not job.processes())
    assert not (job.folder / "attempt_2").exists()


def test_an_srun_that_cannot_be_started_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    standby = StandbyStep([str(tmp_path / "srun")], {}, 0.0)
    for _ in range(2):
        standby.look()
    assert capsys.readouterr().out.count("no standby for the next attempt") == 1
