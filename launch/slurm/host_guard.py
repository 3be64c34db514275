"""Requeues a job whose first node is lost: python -m launch.slurm.host_guard --job N --host NODE.

A job that outlives a lost node (sbatch --no-kill) also outlives the node of its batch step. Slurm then lets the allocation
stand empty until the time limit (seen with 22.05). A guard on another node of the job looks at the first node, and requeues
the job when the first node is no longer one of the job's nodes.

In: the job. Out: nothing, or a requeue. The batch step starts the guard by srun, and starts it again if it ended.

Torch-free.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from configs.own_packages import command
from launch.slurm import node_states, scheduler
from launch.slurm.scheduler import SchedulerError

# The name of the guard's step in squeue.
GUARD_NAME = "phalanx-guard"
LOOK_S = 10.0
# The least time between two starts of a guard, in seconds.
PAUSE_S = 30.0
PATIENCE_S = 600.0


class HostGuard:
    """The guard of a job, as the batch step sees it. An environment without a step's node name has no guard."""

    def __init__(self, job: int, environ: Mapping[str, str]) -> None:
        self._job, self._host = job, environ.get("SLURMD_NODENAME", "")
        self._nodes: tuple[str, ...] = ()
        self._step: subprocess.Popen[bytes] | None = None
        self._next_s = 0.0

    def watch_from(self, nodes: Sequence[str]) -> None:
        """Keep a guard on one of `nodes`, which work: the last one, where spare nodes are, that is not the first node itself."""
        self._nodes = tuple(node for node in nodes if node != self._host)
        self.keep()

    def keep(self) -> None:
        """Start the guard if there is none."""
        if not self._host or not self._nodes or (self._step is not None and self._step.poll() is None):
            return
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + PAUSE_S
        self._nodes = (self._nodes[-1], *self._nodes[:-1])
        where = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={self._nodes[0]}"]
        words = ["srun", "--overlap", "--quiet", f"--job-name={GUARD_NAME}", "--gres=none", *where]
        guard = command(sys.executable, "launch.slurm.host_guard")
        self._step = subprocess.Popen([*words, *guard, "--job", str(self._job), "--host", self._host], stdin=subprocess.DEVNULL)


def goes_on_without(job: int, host: str) -> bool:
    """Has Slurm taken `host` away from the running job? False while the controller is away."""
    try:
        found = scheduler.find_jobs([job]).get(job)
        return found is not None and found.state == "RUNNING" and host not in scheduler.expand(found.nodes)
    except SchedulerError:
        return False


def guard(job: int, host: str) -> None:
    """Look until `host` is lost, then requeue the job, or end it where requeue is forbidden. Raises SchedulerError.

    The controller is asked only while the host's slurmd takes no connection.
    """
    place = node_states.slurmd_place(host)
    while (place is not None and node_states.accepts(place)) or not goes_on_without(job, host):
        time.sleep(LOOK_S)
    try:
        scheduler.requeue(job, (), PATIENCE_S)
    except SchedulerError as error:
        print(f"phalanx: {host} is lost, and its job with it: {error}", file=sys.stderr, flush=True)
        scheduler.cancel([job])


def main(argv: Sequence[str]) -> int:
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        # These are for the ranks, and some of Slurm's ways to send them reach every step.
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm.host_guard", description="Requeues a job that lost its first node."
    )
    parser.add_argument("--job", type=int, required=True, help="the job's number")
    parser.add_argument("--host", required=True, help="Slurm's name of the node that runs the batch step")
    found = parser.parse_args(list(argv))
    guard(found.job, found.host)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
