"""A run under the private Slurm that gets blows. In: a `Case`. Out: a `Struck` for each blow that came, and a finished run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from launch.slurm.lifecycle import OVER
from launch.slurm.scheduler import find_jobs
from launch.status import read_status
from pretrain.run.folder import live_holder
from tests.chaos.local_runs import WATCHFUL, Struck, empty, fill
from tests.chaos.moments import caught
from tests.chaos.plan import FULL_DISK, Blow, Case
from tests.slurm import world
from tests.slurm.cluster import Cluster
from tests.slurm.world import Run, submit

SETTLE_S = 300.0
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


class SlurmRun:
    """A submitted run; in place, with a spare node."""

    def __init__(self, case: Case, cluster: Cluster, config: Path, run_dir: Path, last: int, *words: str) -> None:
        in_place = ["launch.slurm.spare_nodes=1", "launch.restart.standby_after_s=0"]
        place = in_place if case.in_place else ["launch.restart.in_place=false"]
        self.last, self.run = last, submit(cluster, config, run_dir, *WORDS, *place, *words)

    def strike(self, blow: Blow) -> Struck:
        """Raises Missed when the run is over before."""
        with caught(self._rank_0, self._is_over, blow, self.last) as beat:
            life, began_s = self.run.life, time.monotonic()
            self.run.hit.append(f"{blow.way} in attempt {life.attempt} at step {beat.step}, {beat.phase}")
            # What was to be hit may have ended meanwhile.
            cause = ""
            with suppress(psutil.NoSuchProcess, IndexError):
                cause = ACTS[blow.way](self.run)
        if blow.way == FULL_DISK:
            empty(self.run.folder.path.parent)
        if cause:
            self._settle(len(life.ends))
        if any(end.cause == "stopped" for end in self.run.life.ends[len(life.ends) :]):
            self._resume()
        if blow.way == "time limit" and not self._is_over():
            subprocess.run(["scontrol", "update", f"jobid={self.run.job}", "TimeLimit=UNLIMITED"], check=True)
        return Struck(blow.way, beat.phase, beat.step, life.attempt, time.monotonic() - began_s)

    def finish(self) -> None:
        self.run.cluster.wait_for(self._is_over, f"the run's end: {self.run.hit}", SETTLE_S)
        status = read_status(self.run.folder)
        assert status.state == "finished", f"{status.state}, {status.why}: {self.run.story()}"

    def end(self) -> None:
        """What is left of it: the cluster's `restore` cancels all jobs."""

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
