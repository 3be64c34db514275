"""The Slurm step of an attempt: its srun command, and its end by force. In: the batch script's command, a job.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from launch.slurm import scheduler

# The name of the guard's step in squeue (launch/slurm/host_guard.py).
GUARD_NAME = "phalanx-guard"

# Options of a step beside others that hold the job's resources. Where memory is counted by core, Slurm 22.05 refuses --overlap
# alone, because the other step has the memory. --mem=0: the memory of the job, taken from nobody.
OVERLAP = ("--overlap", "--mem=0")
_OWN_MEMORY = re.compile(r"--mem(-per-[a-z]+)?(=|$)")


def step_words(command: Sequence[str], filled: Mapping[str, str], again: bool) -> list[str]:
    """The command with its placeholders replaced by the values of `filled`. `again`: not the first step of this allocation."""
    words = fill(command, filled)
    if again:
        # The step before may still count as running, on a node that is lost. Its nodes would be busy. srun takes one option for
        # memory only.
        words[1:1] = OVERLAP[:1] if any(map(_OWN_MEMORY.match, words)) else OVERLAP
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
