"""Slurm's commands. In: job ids and scripts. Out: what Slurm says, as values; `SchedulerError` with its words otherwise.

Only options that 22.05 has are used; JSON output, which sites may lack, is not.

Torch-free.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from configs.units import seconds_of

TIMEOUT_S = 30.0
# States in which a job will still run or is running (squeue's long names).
LIVE = frozenset(
    {"PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
     "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)  # fmt: skip
NODE_LOST = ("down", "fail", "drain", "no_respond", "unk", "error", "power", "reboot")
# What the controller says when it will not do it later either: a site or a job that forbids requeue, another's job, no job.
FINAL = ("presently disabled", "permission denied", "invalid job id")


class SchedulerError(Exception):
    """A command of Slurm that failed, with what it said."""


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue or sacct shows it. `start`: when it began or is expected to; empty: not known."""

    number: int
    state: str
    reason: str = ""
    nodes: str = ""
    start: str = ""

    @property
    def live(self) -> bool:
        return self.state in LIVE


@dataclass(frozen=True)
class SlurmJobDetails:
    """What the running job asks about itself. `limit_s`: when its time limit ends, seconds since the epoch; infinite without one.

    Slurm's EndTime is not the limit: a preemption moves it to the end of the partition's grace time.
    """

    restarts: int
    limit_s: float


def call(words: Sequence[str], timeout_s: float = TIMEOUT_S) -> str:
    """Run a command, return its stdout. Raises SchedulerError: it is missing, failed, or did not answer."""
    return _run(words, timeout_s).stdout


def _run(words: Sequence[str], timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError as error:
        raise SchedulerError(f"{words[0]} is not on this machine's PATH") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{words[0]} gave no answer within {timeout_s:g} s") from error
    if done.returncode:
        raise SchedulerError(done.stderr.strip() or done.stdout.strip() or f"{words[0]} exited with {done.returncode}")
    return done


def call_again(words: Sequence[str], patience_s: float) -> str:
    """`call`, repeated while the controller is away (a restart takes seconds to minutes), but not when it refuses for good."""
    deadline, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return call(words)
        except SchedulerError as error:
            refused = any(final in str(error).lower() for final in FINAL)
            if refused or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 15.0)


def test_only(script: Path) -> str:
    """Would sbatch take it? Returns its estimate of the start. Raises SchedulerError with its reason."""
    return _run(["sbatch", "--test-only", str(script)]).stderr.strip()


def submit(script: Path, dependency: str | None = None) -> int:
    """The job's number."""
    options = [f"--dependency={dependency}"] if dependency else []
    # --parsable prints NUMBER or NUMBER;CLUSTER
    return int(call(["sbatch", "--parsable", *options, str(script)]).strip().split(";")[0])


def find_jobs(numbers: Sequence[int]) -> dict[int, SlurmJob]:
    """By number; those that neither squeue nor sacct knows (any more) are left out. Raises SchedulerError."""
    found: dict[int, SlurmJob] = {}
    for number in numbers:
        try:
            rows = call(["squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%i|%T|%r|%N|%S"]).splitlines()
        except SchedulerError as error:
            if "invalid job id" not in str(error).lower():
                raise
            rows = []
        for row in rows:
            _, state, reason, nodes, start = row.split("|", 4)
            found[number] = SlurmJob(number, state, "" if reason == "None" else reason, nodes, "" if start == "N/A" else start)
        if number not in found and (job := _accounted(number)):
            found[number] = job
    return found


def _accounted(number: int) -> SlurmJob | None:
    """From the accounting, where a site has one."""
    try:
        rows = call(["sacct", "--noheader", "--parsable2", "-X", f"--jobs={number}", "--format=State,NodeList,Start"])
    except SchedulerError:
        # No sacct, or no slurmdbd behind it: the run folder still tells how the run ended.
        return None
    for row in rows.splitlines()[-1:]:
        state, nodes, start = row.split("|")
        return SlurmJob(number, state.split()[0], "", "" if nodes == "None assigned" else nodes, start)
    return None


def details(number: int) -> SlurmJobDetails:
    """Raises SchedulerError."""
    text = call(["scontrol", "show", "job", "-o", str(number)], timeout_s=10.0)
    values = dict(word.split("=", 1) for word in text.split() if "=" in word)
    begin_s, length_s = _seconds(values.get("StartTime", "")), seconds_of(values.get("TimeLimit"))
    limit_s = begin_s + length_s if begin_s is not None and length_s is not None else math.inf
    return SlurmJobDetails(int(values.get("Restarts", 0)), limit_s)


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        # "Unknown": the job hasn't begun.
        return None


def requeue(number: int, exclude: Sequence[str], patience_s: float) -> None:
    """Back into the queue, without the nodes in `exclude` (all that are to be kept off). Raises SchedulerError."""
    if not exclude:
        call_again(["scontrol", "requeue", str(number)], patience_s)
        return
    call_again(["scontrol", "requeuehold", str(number)], patience_s)
    call_again(["scontrol", "update", f"jobid={number}", f"ExcNodeList={','.join(exclude)}"], patience_s)
    call_again(["scontrol", "release", str(number)], patience_s)


def keep_off(numbers: Sequence[int], nodes: Sequence[str]) -> None:
    """Have waiting jobs start without these nodes."""
    for number in numbers:
        call(["scontrol", "update", f"jobid={number}", f"ExcNodeList={','.join(nodes)}"])


def cancel(numbers: Sequence[int]) -> None:
    call(["scancel", *map(str, numbers)])


def signal_batch(number: int, name: str) -> None:
    """To the batch step only."""
    call(["scancel", f"--signal={name}", "--batch", str(number)])


def expand(nodelist: str) -> list[str]:
    """node[1-3] → node1, node2, node3."""
    return call(["scontrol", "show", "hostnames", nodelist]).split()


def lost_nodes(nodes: Sequence[str]) -> list[str]:
    """Those of `nodes` that Slurm holds for down, failing or drained."""
    rows = call(["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T"]).splitlines()
    states = dict(row.split("|") for row in rows)
    return [node for node in nodes if any(word in states.get(node, "unk").lower() for word in NODE_LOST)]
