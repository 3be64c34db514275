"""The Slurm step of an attempt: its srun command, and its end by force. In: the batch script's command, a job.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.slurm import scheduler
from launch.slurm.host_guard import GUARD_NAME


def step_words(command: Sequence[str], filled: Mapping[str, str], again: bool) -> list[str]:
    """The command with its placeholders replaced by the values of `filled`. `again`: not the first step of this allocation."""
    words = fill(command, filled)
    if again:
        # The step before may still count as running, on a node that is lost. Its nodes would be busy.
        words.insert(1, "--overlap")
    return words


def kill_steps(job: int) -> None:
    """Send SIGKILL to the tasks of the job's steps, the guard's step excepted. Raises SchedulerError."""
    steps = scheduler.call(["squeue", "--all", "--noheader", "--steps", f"--jobs={job}", "--format=%i|%j"])
    for name, job_name in scheduler.rows_of(steps, 2):
        if name.rpartition(".")[2].isdecimal() and job_name != GUARD_NAME:
            scheduler.call(["scancel", "--signal=KILL", name])


def fill(words: Sequence[str], filled: Mapping[str, str]) -> list[str]:
    """The words with each placeholder of `filled` replaced by its value."""
    for name, value in filled.items():
        words = [word.replace(name, value) for word in words]
    return list(words)
