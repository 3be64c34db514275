"""The agent of a node on a real torchrun: logs of each rank or gathered, signals once, hangs reported, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Config
from launch.local.parent_guard import MARK_NAME, kill_marked, marked_pids
from launch.logs import print_rank_log
from launch.plan import start_words
from launch.slurm.node_agent import cores_note
from launch.watch.failures import find_failures
from launch.watch.heartbeats import RankState, WatchPolicy, make_watch_policy, read_reports
from launch.watch.triage import combine
from pretrain.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = str(Path(__file__).resolve().parents[1] / "rank_program.py")
CONFIG = """
run: {steps: 5, dir: run}
model: {vocab_size: 256}
data: {tokenizer: {path: t.model}, train: [{path: x}]}
launch: {processes_per_node: 2}
"""


class Agent:
    """python -m launch.slurm.node_agent for attempt 1 of a run folder, in a session of its own."""

    def __init__(self, folder: Path, plan: dict[str, Any], policy: WatchPolicy) -> None:
        (folder / "c.yaml").write_text(CONFIG)
        self.run = RunFolder(folder / "run")
        self.attempt_dir, self.log_dir = self.run.launch_dir(1), self.run.log_dir(1)
        self.mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
        torchrun = [
            sys.executable, "-m", "launch.torchrun", "--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "--signals-to-handle", "SIGQUIT",
            *start_words(True), PROGRAM, "--config", "c.yaml",
        ]  # fmt: skip
        words = ["--attempt-dir", str(self.attempt_dir), "--log-dir", str(self.log_dir), "--policy", policy.to_json()]
        env = {
            **os.environ, MARK_NAME: self.mark, "RANK_PLAN": json.dumps(plan), "PYTHONPATH": str(ROOT),
            "PHALANX_ATTEMPT": "1", "SLURMD_NODENAME": "node7", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.slurm.node_agent", *words, "--", *torchrun],
            cwd=folder,
            env=env,
            start_new_session=True,
        )

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.run.metrics.exists() and f'"step": {step},' in self.run.metrics.read_text())

    def wait_until(self, true: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline and self.process.poll() is None, "it didn't come true in time"
            time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def make(plan: dict[str, Any], **changes: Any) -> Agent:
        config = Config()
        config.launch.processes_per_node = 2
        policy = replace(make_watch_policy(config), report_interval_s=0.5)
        agents.append(Agent(tmp_path, plan, replace(policy, **changes)))
        return agents[-1]

    yield make
    for agent in agents:
        kill_marked(agent.mark, quiet_s=0.2)
        agent.process.wait()


def test_a_signal_to_every_process_lets_the_ranks_save(start: Callable[..., Agent], tmp_path: Path) -> None:
    """As Slurm sends it: to agent, torchrun and ranks alike. torchrun must not end its ranks, and they must count it once."""
    agent = start({"steps": 1000, "pause_s": 0.05})
    agent.wait_for_step(3)
    os.killpg(agent.process.pid, signal.SIGTERM)
    assert agent.process.wait(60) == 0
    outcome = agent.run.read_outcome()
    assert outcome is not None and outcome.state == "preempted"
    assert sorted(path.name for path in agent.log_dir.iterdir()) == ["node7.torchrun.log", "rank_0.log", "rank_1.log"]
    for rank in "01":
        assert (agent.log_dir / f"rank_{rank}.log").read_text().count("phalanx: SIGTERM during step ") == 1
    (report,) = read_reports(agent.attempt_dir)
    assert (report.host, report.exit_code, report.hung, report.failures) == ("node7", 0, False, ())
    assert not list(tmp_path.glob("phalanx-*")), "nothing stays on the node's own disk"


def test_a_signal_before_there_are_ranks(start: Callable[..., Agent]) -> None:
    agent = start({"steps": 1000, "pause_s": 0.05})
    agent.wait_until(lambda: (agent.log_dir / "node7.torchrun.log").exists())
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(60) in (0, 128 + signal.SIGTERM), "0: the ranks were there already, and saved"
    assert marked_pids(agent.mark) == []


def test_logs_and_failures_of_a_large_run_are_gathered(start: Callable[..., Agent]) -> None:
    agent = start({"steps": 100, "pause_s": 0.02, "raise": {"0": 3}}, gather=True)
    assert agent.process.wait(60) == 1
    assert sorted(path.name for path in agent.log_dir.iterdir()) == ["node7.failures.jsonl", "node7.log"]
    log = (agent.log_dir / "node7.log").read_text()
    assert "[rank 0] step 1\n" in log and "[rank 0] ValueError: rank 0 can't go on" in log and "[torchrun] " in log
    assert all(line.startswith("[") for line in log.splitlines())
    first = find_failures(agent.log_dir)[0]
    assert (first.rank, first.kind, first.node) == (0, "exception", "node7")
    (report,) = read_reports(agent.attempt_dir)
    assert report.exit_code == 1 and report.failures[0]["rank"] == 0
    shown = io.StringIO()
    print_rank_log(agent.run, 0, None, False, shown, shown)
    assert shown.getvalue().startswith("rank 0 on node7 failed first:") and "\nstep 1\nstep 2\n" in shown.getvalue()


def test_a_hang_is_reported_and_the_agents_death_leaves_nothing(start: Callable[..., Agent]) -> None:
    """Rank 0 waits for ever, rank 1 is stopped: the report says so, with rank 0's stack. Ending it is the supervisor's."""
    agent = start({"steps": 10000, "pause_s": 0.05, "hang": {"0": 4}}, step_timeout_s=1.0)
    agent.wait_for_step(3)

    def states() -> dict[int, RankState]:
        return {state.rank: state for report in read_reports(agent.attempt_dir) for state in report.ranks}

    agent.wait_until(lambda: 1 in states() and states()[1].step > 0)
    os.kill(states()[1].pid, signal.SIGSTOP)
    agent.wait_until(lambda: states()[0].frames != () and states()[1].process == "stopped")
    reports = read_reports(agent.attempt_dir)
    assert reports[0].hung and any("wait_for_ever" in frame for frame in states()[0].frames)
    found = combine(reports, replace(make_watch_policy(Config()), step_timeout_s=1.0))
    assert found is not None and [state.rank for state in found.ranks] == [1] and found.nodes == ("node7",)
    assert found.line.startswith("hung: rank 1 on node7 is late: its process is stopped (SIGSTOP) in step ")
    assert "wait_for_ever" in (agent.log_dir / "node7.stacks.txt").read_text()
    assert agent.process.poll() is None
    agent.process.kill()
    agent.process.wait()
    deadline = time.monotonic() + 20
    while marked_pids(agent.mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked_pids(agent.mark) == []


def test_ranks_that_must_share_cores_are_told() -> None:
    assert cores_note(4, 4, "node1") == cores_note(96, 8, "node1") == ""
    assert cores_note(1, 8, "node1").startswith(
        "phalanx: note: node1: 8 ranks may use 1 core in all; set launch.slurm.cpus_per_task"
    )
