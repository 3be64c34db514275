"""A run under the private Slurm that gets blows. In: a `Case`. Out: a `Struck` for each blow that came, and a finished run."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from launch.slurm.lifecycle import OVER
from launch.slurm.scheduler import details, find_jobs
from launch.status import read_status
from pretrain.run.lock import live_holder
from tests.chaos.local_runs import WATCHFUL, Struck, empty, fill
from tests.chaos.moments import caught
from tests.chaos.plan import BETWEEN, FULL_DISK, Blow, Case
from tests.slurm import world
from tests.slurm.cluster import Cluster
from tests.slurm.world import Run, submit

SETTLE_S = 300.0
# Rank 0 stands still meanwhile, which is no hang yet.
STANDBY_S = 12.0
# What the batch step says of an attempt that took the waiting step.
WARM = re.compile(r"phalanx: attempt (\d+) on .*\nphalanx: its nodes have imported the libraries")
# Memory is a resource of the private cluster: each second pair of cases asks for it, as many sites demand.
MEMORY = ["launch.slurm.mem=2G"]
# Blows often come before the first save of an attempt.
WORDS = [WATCHFUL, "launch.slurm.max_without_progress=20"]


def kill_a_fork_server(run: Run) -> str:
    psutil.Process(run.ranks()[-1].ppid()).kill()
    return "crashed"


def sigterm(run: Run) -> str:
    """To the batch step, as scancel does it: the run saves and is over, and the user goes on with it."""
    subprocess.run(["scancel", "--signal=TERM", "--batch", str(run.job)], check=True)
    return "stopped"


def requeue(run: Run) -> str:
    subprocess.run(["scontrol", "requeue", str(run.job)], check=True)
    return "preempted"


def fill_the_disk(run: Run) -> str:
    fill(run.folder.path.parent)
    return ""


ACTS: dict[str, Callable[[Run], str]] = {
    "SIGKILL a rank": world.kill_a_rank,
    "SIGKILL the fork server": kill_a_fork_server,
    "SIGKILL torchrun's agent": world.kill_an_agent,
    "SIGKILL the batch step": world.kill_batch_step,
    "SIGSTOP a rank": world.stop_a_rank,
    "SIGTERM": sigterm,
    "SIGUSR1": world.usr1,
    FULL_DISK: fill_the_disk,
    "power off a node": world.power_off,
    "power off the first node": world.power_off_first,
    "restart slurmctld": world.restart_controller,
    "scontrol requeue": requeue,
    "preemption": world.preempt,
    "time limit": world.near_the_limit,
}
# What a second blow may find refused, because the job is in the queue already.
COMMANDS = {
    "SIGTERM": ["scancel", "--signal=TERM", "--batch", "{job}"],
    "SIGUSR1": ["scancel", "--signal=USR1", "--batch", "{job}"],
    "scontrol requeue": ["scontrol", "requeue", "{job}"],
    "scancel": ["scancel", "{job}"],
}


class SlurmRun:
    """A submitted run; in place, with a spare node."""

    def __init__(self, case: Case, cluster: Cluster, config: Path, run_dir: Path, last: int, *words: str) -> None:
        in_place = ["launch.slurm.spare_nodes=1", "launch.restart.standby_after_s=0"]
        place = in_place if case.in_place else ["launch.restart.in_place=false"]
        memory = MEMORY if case.seed % 4 >= 2 else []
        self.last, self.run = last, submit(cluster, config, run_dir, *WORDS, *place, *memory, *words)

    def strike(self, blow: Blow) -> list[Struck]:
        """Raises Missed when the run is over before."""
        with caught(self._rank_0, self._is_over, blow, self.last) as beat:
            life, began_s = self.run.life, time.monotonic()
            self.run.hit.append(f"{blow.way} in attempt {life.attempt} at step {beat.step}, {beat.phase}")
            # What was to be hit may have ended meanwhile.
            cause = ""
            if blow.second:
                self._wait_for_standby(len(life.nodes))
            with suppress(psutil.NoSuchProcess, IndexError):
                cause = ACTS[blow.way](self.run)
        first = Struck(blow.way, beat.phase, beat.step, life.attempt, time.monotonic() - began_s)
        if blow.second:
            return [first, self._strike_again(blow, life.attempt)]
        if blow.way == FULL_DISK:
            empty(self.run.folder.path.parent)
        if cause:
            self._settle(len(life.ends))
        if any(end.cause == "stopped" for end in self.run.life.ends[len(life.ends) :]):
            self._resume()
        if blow.way == "time limit" and not self._is_over():
            subprocess.run(["scontrol", "update", f"jobid={self.run.job}", "TimeLimit=UNLIMITED"], check=True)
        return [replace(first, seconds=time.monotonic() - began_s)]

    def _wait_for_standby(self, nodes: int) -> None:
        deadline = time.monotonic() + STANDBY_S
        while len(self.run.standbys()) < nodes and time.monotonic() < deadline:
            time.sleep(0.1)

    def _strike_again(self, blow: Blow, attempt: int) -> Struck:
        """The second blow, while the run is on its way from `attempt` to the next one. The job may be in the queue by then."""
        time.sleep(blow.second_s)
        began_s, job = time.monotonic(), self.run.job
        self.run.hit.append(f"{blow.second} {blow.second_s:.1f} s later")
        ends_it, restarts = False, details(job).restarts
        if blow.second in COMMANDS:
            done = subprocess.run([word.format(job=job) for word in COMMANDS[blow.second]], capture_output=True, check=False)
            ends_it = blow.second in ("SIGTERM", "scancel") and done.returncode == 0
        else:
            ACTS[blow.second](self.run)
        if ends_it:
            # The user has ended it: it must not come back by itself.
            self.run.cluster.wait_for(lambda: not find_jobs([job])[job].live, f"the job's end: {self.run.story()}", SETTLE_S)
            assert details(job).restarts == restarts, f"the job went back to the queue: {self.run.story()}"
            if not self.run.folder.done.exists():
                self._resume()
        else:
            self.run.cluster.wait_for(lambda: self._went_on(attempt), f"the next attempt: {self.run.story()}", SETTLE_S)
        return Struck(blow.second, BETWEEN, 0, attempt, time.monotonic() - began_s)

    def _went_on(self, attempt: int) -> bool:
        return self._is_over() or (self.run.life.attempt > attempt and bool(self.run.first_rank()))

    def finish(self) -> None:
        self.run.cluster.wait_for(self._is_over, f"the run's end: {self.run.hit}", SETTLE_S)
        status = read_status(self.run.folder)
        assert status.state == "finished", f"{status.state}, {status.why}: {self.run.story()}"

    def end(self) -> None:
        """What is left of it: the cluster's `restore` cancels all jobs."""

    def warm_attempts(self) -> set[int]:
        logs = sorted((self.run.folder.path / "logs").glob("slurm-*.out"))
        return {int(number) for path in logs for number in WARM.findall(path.read_text(errors="replace"))}

    def _rank_0(self) -> psutil.Process | None:
        return next(iter(self.run.first_rank()), None)

    def _is_over(self) -> bool:
        """A batch step that is killed after its ranks have finished records no end."""
        return self.run.life.phase == OVER or (self.run.folder.done.exists() and live_holder(self.run.folder) is None)

    def _resume(self) -> None:
        job = self.run.job
        self.run.cluster.wait_for(lambda: not find_jobs([job])[job].live, "the job's end", 120)
        done = world.phalanx("resume", str(self.run.folder.path))
        assert done.returncode == 0, f"{done.stderr}: {self.run.story()}"

    def _settle(self, ends: int) -> None:
        """Until one more end is recorded."""
        deadline = time.monotonic() + SETTLE_S
        while not self._is_over() and len(self.run.life.ends) <= ends:
            assert time.monotonic() < deadline, f"no end was recorded: {self.run.story()}"
            time.sleep(0.1)
