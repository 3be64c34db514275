"""Slurm's commands. In: job ids and scripts. Out: Slurm's answers as values, or `SchedulerError` with its message.

Only options of Slurm 22.05 are used, and no JSON output, which some sites lack. The answers are read defensively: wrappers
of a site may print banners around them, and a partition may be hidden from this user. A node or job that Slurm does not
show is unknown, which is not the same as lost.

Torch-free.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from configs.units import seconds_of
from launch.slurm.environment import query_environment, submission_environment

TIMEOUT_S = 30.0
# Between the requeue and the end of the job that asked for it lies Slurm's KillWait, 30 s by default. A job that is not
# released by then stays held.
HELD_PATIENCE_S = 8.0
# States of jobs that run or will run (squeue's long names).
LIVE = frozenset(
    {"PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
     "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)  # fmt: skip
# Refusals that will not change later: requeue is forbidden, the job is another user's, or there is no such job.
FINAL = ("presently disabled", "permission denied", "invalid job id")


class SchedulerError(Exception):
    """A command of Slurm that failed, with what it said."""


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue or sacct shows it. `start` is the actual or expected start, or empty if unknown."""

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
    """A running job's view of itself.

    `limit_s` is the end of its time limit in seconds since the epoch, or infinite. Slurm's EndTime is not used for it,
    because a preemption moves EndTime to the end of the partition's grace time. `excluded` are the nodes of ExcNodeList, by
    whomever they were excluded.
    """

    restarts: int
    limit_s: float
    excluded: tuple[str, ...] = ()


def call(words: Sequence[str], timeout_s: float = TIMEOUT_S) -> str:
    """Run a command and return its stdout. Raises SchedulerError if it is missing, fails, or does not answer."""
    return _run(words, query_environment(os.environ), timeout_s).stdout


def _run(words: Sequence[str], env: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    try:
        process = _start_shielded(words, dict(env))
    except FileNotFoundError as error:
        raise SchedulerError(f"{words[0]} is not on this machine's PATH") from error
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise SchedulerError(f"{words[0]} gave no answer within {timeout_s:g} s") from error
        finally:
            # Does nothing to a command that has ended.
            process.kill()
    if process.returncode:
        raise SchedulerError(stderr.strip() or stdout.strip() or f"{words[0]} exited with {process.returncode}")
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def _start_shielded(words: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a command that SIGTERM does not end.

    A requeue makes Slurm send SIGTERM to every process of the job, to the very command that asked for the requeue and to
    those that follow it too. A process inherits the blocked signals of the thread that starts it.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return subprocess.Popen(
            words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def call_again(words: Sequence[str], patience_s: float) -> str:
    """`call`, repeated for `patience_s` while the controller is away. A final refusal is raised at once."""
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


def rows_of(text: str, cells: int) -> list[list[str]]:
    """The lines of `text` with `cells` cells that | separates. Other lines come from a site's wrapper, and are left out."""
    rows = [line.strip().split("|", cells - 1) for line in text.splitlines()]
    return [row for row in rows if len(row) == cells]


def test_only(script: Path, options: Sequence[str] = ()) -> str:
    """sbatch's estimate of the start. Raises SchedulerError with its reason.

    A refusal is not final: `sbatch --test-only` also refuses a job that only has to wait for drained nodes.
    """
    done = _run(["sbatch", "--test-only", *options, str(script)], submission_environment(os.environ).kept)
    estimate = next((line for line in done.stderr.splitlines() if "to start at" in line), "")
    return estimate.strip() or done.stderr.strip()


def submit(script: Path, dependency: str | None = None, exclude: Sequence[str] = (), unset: Sequence[str] = ()) -> int:
    """Submit `script` and return the job id. Raises SchedulerError.

    `exclude` replaces the script's own list of excluded nodes. `unset` names variables that sbatch must not see.
    """
    options = [f"--dependency={dependency}"] if dependency else []
    options += [f"--exclude={','.join(exclude)}"] if exclude else []
    kept = submission_environment(os.environ).kept
    env = {name: value for name, value in kept.items() if name not in unset}
    said = _run(["sbatch", "--parsable", *options, str(script)], env).stdout
    # --parsable prints NUMBER or NUMBER;CLUSTER. A site's wrapper may print lines before and after it.
    numbers = [match[1] for line in said.splitlines() if (match := re.fullmatch(r"(\d+)(;\S+)?", line.strip()))]
    if not numbers:
        raise SchedulerError(
            f"sbatch succeeded, but its output has no job id: {said.strip()[:200]!r}; a job may be queued: look with "
            "squeue --me, and end it by scancel before another try"
        )
    return int(numbers[-1])


def find_jobs(numbers: Sequence[int]) -> dict[int, SlurmJob]:
    """The jobs by id. A job that neither squeue nor sacct knows is left out. Raises SchedulerError."""
    found: dict[int, SlurmJob] = {}
    for number in numbers:
        words = ["squeue", "--all", "--noheader", "--states=all", f"--jobs={number}", "--format=%i|%T|%r|%N|%S"]
        try:
            rows = rows_of(call(words), 5)
        except SchedulerError as error:
            if "invalid job id" not in str(error).lower():
                raise
            rows = []
        for _, state, reason, nodes, start in rows:
            found[number] = SlurmJob(number, state, _known(reason, "None"), nodes, _known(start, "N/A"))
        if number not in found and (job := _accounted(number)):
            found[number] = job
    return found


def _known(text: str, unknown: str) -> str:
    return "" if text == unknown else text


def _accounted(number: int) -> SlurmJob | None:
    """The job from the accounting database. None without such a database or such a job."""
    try:
        text = call(["sacct", "--noheader", "--parsable2", "-X", f"--jobs={number}", "--format=State,NodeList,Start"])
    except SchedulerError:
        # No sacct, or no slurmdbd behind it. The run folder still tells how the run ended.
        return None
    for state, nodes, start in rows_of(text, 3)[-1:]:
        return SlurmJob(number, state.split()[0], "", _known(nodes, "None assigned"), start)
    return None


def details(number: int) -> SlurmJobDetails:
    """What `scontrol show job` says about the job `number`. Raises SchedulerError."""
    return _job_details(call(_show_job(number), timeout_s=10.0))


def _show_job(number: int) -> list[str]:
    return ["scontrol", "--all", "show", "job", "-o", str(number)]


def _job_details(text: str) -> SlurmJobDetails:
    values = dict(word.split("=", 1) for word in text.split() if "=" in word)
    begin_s, length_s = _seconds(values.get("StartTime", "")), seconds_of(values.get("TimeLimit"))
    limit_s = begin_s + length_s if begin_s is not None and length_s is not None else math.inf
    excluded = _known(values.get("ExcNodeList", ""), "(null)")
    return SlurmJobDetails(int(values.get("Restarts", 0)), limit_s, tuple(expand(excluded)) if excluded else ())


def _seconds(text: str) -> float | None:
    """Seconds since the epoch. None for "Unknown", the start of a job that has not begun."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def requeue(number: int, exclude: Sequence[str], patience_s: float) -> str:
    """Put the job back into the queue, and keep it off `exclude` and off all nodes excluded before.

    Returns what went wrong after the job was back in the queue, or an empty string. Raises SchedulerError while the job is
    not in the queue.
    """
    if not exclude:
        call_again(["scontrol", "requeue", str(number)], patience_s)
        return ""
    # Asked before: once the requeue is taken, Slurm is about to end the job that asks.
    union = _united(call_again(_show_job(number), patience_s), exclude)
    call_again(["scontrol", "requeuehold", str(number)], patience_s)
    failures: list[str] = []
    for words in (_exclusion(number, union), ["scontrol", "release", str(number)]):
        try:
            call_again(words, min(patience_s, HELD_PATIENCE_S))
        except SchedulerError as error:
            failures.append(f"{' '.join(words)}: {error}")
    return "; ".join(failures)


def exclude_nodes(numbers: Sequence[int], nodes: Sequence[str]) -> None:
    """Keep waiting jobs off `nodes`, and off all nodes excluded before. Raises SchedulerError."""
    for number in numbers:
        _exclude(number, nodes, 0.0)


def _exclude(number: int, nodes: Sequence[str], patience_s: float) -> None:
    call_again(_exclusion(number, _united(call(_show_job(number)), nodes)), patience_s)


def _united(job_text: str, nodes: Sequence[str]) -> list[str]:
    """The union of a job's exclusions and `nodes`. `scontrol update` alone would drop the nodes that the user excluded."""
    return list(dict.fromkeys([*_job_details(job_text).excluded, *nodes]))


def _exclusion(number: int, nodes: Sequence[str]) -> list[str]:
    return ["scontrol", "update", f"jobid={number}", f"ExcNodeList={','.join(nodes)}"]


def cancel(numbers: Sequence[int]) -> None:
    """End the jobs by scancel. Raises SchedulerError."""
    call(["scancel", *map(str, numbers)])


def signal_batch(number: int, name: str) -> None:
    """Send the signal `name` to the batch step and to no other process of the job. Raises SchedulerError."""
    call(["scancel", f"--signal={name}", "--batch", str(number)])


def expand(nodelist: str) -> list[str]:
    """The names in a node list of Slurm: node[1-3] gives node1, node2, node3. Raises SchedulerError."""
    lines = (line.strip() for line in call(["scontrol", "show", "hostnames", nodelist]).splitlines())
    # A host name has no blanks; a banner has.
    return [line for line in lines if line and " " not in line]
