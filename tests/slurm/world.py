"""A run under the private Slurm, by the user's commands, and what can happen to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launch.slurm.lifecycle import OVER, RUNNING, RunLifecycle, read_lifecycle
from launch.slurm.scheduler import find_jobs
from launch.watch.processes import STANDBY, name_of
from pretrain.run.files import iterate_lines
from pretrain.run.folder import RunFolder
from tests.run.world import ROOT, attempt_of, beat_of
from tests.slurm.cluster import Cluster

STEPS = 30
NODES = ["launch.target=slurm", "launch.nodes=2", "launch.processes_per_node=1", "cluster.interface=lo"]
# Steps of a tenth of a second leave room to act in; the watchdog waits far longer than any of them.
WORDS = [
    f"run.steps={STEPS}", "batch.global_batch_seqs=16", "checkpoint.interval_steps=4", "launch.watch.step_timeout_s=60",
    "launch.watch.start_timeout_s=120", "launch.slurm.stop_before_s=70", "launch.slurm.max_without_progress=4",
    "launch.slurm.extra=[--exclusive]", "run.eval_interval_steps=5",
]  # fmt: skip


def phalanx(*words: str, timeout_s: float = 120, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.cli", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", **environ}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=timeout_s)


@dataclass
class Run:
    """A submitted run."""

    cluster: Cluster
    folder: RunFolder
    hit: list[str] = field(default_factory=list)

    @property
    def life(self) -> RunLifecycle:
        return read_lifecycle(self.folder)

    @property
    def job(self) -> int:
        return self.life.jobs[0]

    def events(self, kind: str) -> list[dict[str, Any]]:
        rows = [row for _, row in iterate_lines(self.folder.events) if row is not None]
        return [row for row in rows if row.get("kind") == kind]

    def steps(self) -> int:
        rows = [row for _, row in iterate_lines(self.folder.metrics) if row] if self.folder.metrics.exists() else []
        return rows[-1]["step"] if rows else 0

    def wait(self, what: Callable[[], bool], words: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.life.phase != OVER, f"waited for {words}; it is over: {self.story()}"
            assert time.monotonic() < deadline, f"{words} did not come: {self.story()}"
            time.sleep(0.05)

    def wait_to_train(self, more: int = 3) -> None:
        """Until the newest attempt has made `more` steps of its own, or has only a few left."""
        self.wait(self._begun, "the attempt's begin")
        start = self.life.step_before
        self.wait(lambda: self.steps() >= min(start + more, STEPS - 6), f"{more} steps")

    def _begun(self) -> bool:
        """The newest attempt runs, and has cut the record back to where it goes on."""
        life = self.life
        rows = self.events("resumed" if life.step_before else "attempt")
        return life.phase == RUNNING and bool(rows) and rows[-1]["attempt"] == life.attempt

    @contextmanager
    def held_at(self, phase: str) -> Iterator[None]:
        """Rank 0 stands still where its heartbeat says that it is at `phase`, which may last milliseconds, until a signal waits
        for it: what the body sends comes within the phase.
        """
        found: list[psutil.Process] = []
        self.wait(lambda: bool(found.extend(self.first_rank()) or found), "rank 0 of an attempt")
        rank = found[0]
        self.wait(lambda: _stop_at(rank, phase), f"rank 0 {phase}")
        try:
            yield
            self.wait(lambda: _was_signalled(rank), f"a signal to rank 0 {phase}")
        finally:
            rank.resume()

    def first_rank(self) -> list[psutil.Process]:
        """Rank 0 of the attempt that runs now. Ranks of an attempt whose end is recorded may still be on their way out."""
        life, found = self.life, []
        for process in self.ranks()[:2]:
            with suppress(psutil.NoSuchProcess, OSError):
                if life.phase == RUNNING and process.name() == "rank 0" and attempt_of(process) == life.attempt:
                    found.append(process)
        return found[:1]

    def wait_over(self, timeout_s: float = 400) -> RunLifecycle:
        deadline = time.monotonic() + timeout_s
        while self.life.phase != OVER:
            assert time.monotonic() < deadline, f"it is not over: {self.story()}"
            time.sleep(0.2)
        return self.life

    def story(self) -> str:
        """Events and the batch step's output, for a failed assertion."""
        logs = [path.read_text(errors="replace")[-3000:] for path in sorted((self.folder.path / "logs").glob("slurm-*.out"))]
        return "\n".join([f"hit: {self.hit}", self.folder.events.read_text(), *logs])

    def ranks(self) -> list[psutil.Process]:
        """The live rank processes of the job, by rank."""
        # The processes that a rank forks have its name too.
        found = self._processes(lambda process: is_rank(process.name()) and not is_rank(name_of(process.ppid())))
        return [process for _, process in sorted(found, key=lambda pair: int(pair[0].removeprefix("rank ")))]

    def standbys(self) -> list[psutil.Process]:
        """The live processes of the job that have imported the libraries for the next attempt."""
        return [process for _, process in self._processes(lambda process: process.name() == STANDBY)]

    def owns(self, process: psutil.Process) -> bool:
        """Whether the process is of this run's job. Other clusters of this machine have a job of that number, too."""
        env, conf = process.environ(), self.cluster.env["SLURM_CONF"]
        return env.get("SLURM_JOB_ID") == str(self.job) and env.get("SLURM_CONF", conf) == conf

    def _processes(self, belongs: Callable[[psutil.Process], bool]) -> list[tuple[str, psutil.Process]]:
        """The job's live processes and their names; the virtual nodes' processes are this machine's."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                if belongs(process) and self.owns(process):
                    found.append((process.name(), process))
        return found


def is_rank(name: str) -> bool:
    """Whether a process has the name that a rank gives itself."""
    return name.removeprefix("rank ").isdecimal()


def _stop_at(rank: psutil.Process, phase: str) -> bool:
    """Look at a rank's heartbeat for half a second; whether it now stands still at `phase`."""

    def is_there() -> bool:
        beat = beat_of(rank)
        return beat is not None and beat.phase == phase

    for _ in range(250):
        if is_there():
            rank.suspend()
            if is_there():
                return True
            rank.resume()
        time.sleep(0.002)
    return False


def _was_signalled(stopped: psutil.Process) -> bool:
    """Whether a signal waits for the process; Slurm's own end of a job lets it go on first (SIGCONT)."""
    if stopped.status() != psutil.STATUS_STOPPED:
        return True
    status = Path(f"/proc/{stopped.pid}/status").read_text()
    return any(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd")))


def submit(cluster: Cluster, config: Path, run_dir: Path, *words: str, **environ: str) -> Run:
    """`environ`: of the user's shell, which sbatch takes along."""
    done = phalanx("launch", str(config), f"run.dir={run_dir}", *NODES, *WORDS, *words, timeout_s=120, **environ)
    assert done.returncode == 0, done.stderr
    assert "submitted job" in done.stdout and "phalanx status" in done.stdout
    return Run(cluster, RunFolder(run_dir))


# What can happen to a run. Each way acts on a run that trains, and returns the cause that must be recorded.


def preempt(run: Run) -> str:
    """A job of a higher partition takes the nodes."""
    command = ["sbatch", "--partition=urgent", "--exclusive", f"--nodelist={','.join(run.life.nodes)}", "--output=/dev/null"]
    subprocess.run([*command, "--wrap=sleep 1"], check=True, capture_output=True)
    return "preempted"


def near_the_limit(run: Run) -> str:
    """The job's time is cut to the next full minute, and Slurm's warning comes, as --signal in the script asks for it."""
    elapsed = subprocess.run(["squeue", "-h", "-j", str(run.job), "-o", "%M"], check=True, capture_output=True, text=True).stdout
    minutes = int(elapsed.strip().split(":")[0])
    subprocess.run(["scontrol", "update", f"jobid={run.job}", f"TimeLimit={minutes + 1}"], check=True)
    subprocess.run(["scancel", "--signal=USR1", "--batch", str(run.job)], check=True)
    return "time_limit"


def kill_a_rank(run: Run) -> str:
    run.ranks()[-1].kill()
    return "crashed"


def kill_a_rank_beside_standbys(run: Run) -> str:
    """The libraries are imported for the next attempt on all nodes of this one."""
    run.wait(lambda: len(run.standbys()) == len(run.life.nodes), "the standbys of the next attempt")
    return kill_a_rank(run)


def kill_an_agent(run: Run) -> str:
    """The agent of the last node dies alone, and its ranks with it. The other node's ranks fail right after."""
    node = run.life.nodes[-1]
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            is_agent = process.name() != "srun" and "launch.slurm.node_agent" in process.cmdline()
            env = process.environ() if is_agent and run.owns(process) else {}
            if env.get("SLURMD_NODENAME") == node and "PHALANX_LAUNCH" not in env:
                process.kill()
    return "killed"


def stop_a_rank(run: Run) -> str:
    """SIGSTOP: all others wait for it for ever."""
    run.ranks()[-1].send_signal(signal.SIGSTOP)
    return "hung"


def power_off(run: Run) -> str:
    """The node that the batch step isn't on. It stays off: a minute after it answers again, Slurm 22.05 repeats what it could
    not deliver, and ends the next attempt's tasks there.
    """
    node = run.life.nodes[-1]
    run.cluster.power_off(node)
    return "bad_node"


def power_off_first(run: Run) -> str:
    """The node that the batch step is on: nobody is left to write the end."""
    run.cluster.power_off(run.life.nodes[0])
    return "bad_node"


def restart_controller(run: Run) -> str:
    """No end at all: the ranks don't notice."""
    run.cluster.kill_controller()
    time.sleep(1)
    run.cluster.start_controller()
    return ""


def usr1(run: Run) -> str:
    subprocess.run(["scancel", "--signal=USR1", "--batch", str(run.job)], check=True)
    return "preempted"


def kill_batch_step(run: Run) -> str:
    """The batch step alone dies, as by an out-of-memory killer: Slurm ends the job, and the user goes on with it."""
    for process in psutil.process_iter():
        try:
            if "launch.slurm.batch_step" in process.cmdline() and run.owns(process):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    run.cluster.wait_for(lambda: not find_jobs([run.job])[run.job].live, "the job's end", 120)
    # Before an attempt has begun there is nothing to resume.
    job = run.folder.path / "launch" / "job_0001" / "config.yaml"
    again = phalanx(*(["resume", str(run.folder.path)] if run.folder.config.exists() else ["launch", str(job)]))
    assert again.returncode == 0, f"{again.stderr}: {run.story()}"
    return ""


def act(run: Run, way: Callable[[Run], str], phase: str = "") -> None:
    """Let one thing happen to the training run, and wait for the attempt's end to be recorded.

    `phase`: it happens there, else after three steps.
    """
    if not phase:
        run.wait_to_train()
    with run.held_at(phase) if phase else nullcontext():
        attempt, life = run.life.attempt, run.life
        run.hit.append(f"{way.__name__} in attempt {attempt} at step {run.steps()}, {phase or 'training'}")
        cause = way(run)
    if not cause:
        return
    run.wait(lambda: len(run.life.ends) > len(life.ends), f"the end of attempt {attempt}")
    if way is near_the_limit:
        subprocess.run(["scontrol", "update", f"jobid={run.job}", "TimeLimit=UNLIMITED"], check=True)
    end = run.life.ends[len(life.ends)]
    assert end.cause == cause or end.cause == "finished", f"{end}: {run.story()}"
