"""The contract of the run folder: which files it has. This module reads and never writes.

runs/NAME/
    config.yaml        the resolved config of the newest attempt
    provenance.json    origin of each value, code and package versions, host
    metrics.jsonl      the record: one row a step, each step once over all attempts
    experts.jsonl      tokens of each expert, layer by layer, at an interval (pretrain/metrics/expert_counts.py)
    evaluations.jsonl  scores of checkpoints on tasks, where phalanx evaluate --tasks measured them
    events.jsonl       attempts, saves, signals, verdicts: one JSON object a line (pretrain/run/events.py)
    outcome.json       how the last attempt ended
    DONE               the run is finished
    launch/            attempt_0001/ of each attempt: config.yaml, provenance.json, command.sh, launcher.json, metrics_cut.jsonl;
                       job_0001/ of each Slurm submission: the batch script; launch.lock: one launch at a time
    logs/              attempt_0001/: rank_0.log …, torchrun.log, rank_3.failure.json, stacks.txt; on large runs one NODE.log a
                       node. slurm-JOB.out: the output of the batch step
    checkpoints/       step_0000100/ …
    profile/           rank_0.trace.json and rank_0.memory.pickle, where metrics.profile asks for them
    wandb/             W&B's own files, and cursor.json
    tensorboard/       event files, where metrics.sinks asks for them: a folder for each line of the run
    mlflow/            MLflow's sqlite file, where metrics.sinks asks for MLflow and names no other store
    wandb_id           the id of the W&B run that all attempts share; another one after going back to an earlier checkpoint
    doctor/            0001/ …: the reports of phalanx doctor
    huggingface/       an export of the newest checkpoint for transformers, where one was made (make demo)
    report.html        the page of phalanx report, where one was made
    lock               the process that trains in this folder now

pretrain/run/attempt.py begins and ends an attempt in the folder, pretrain/run/lock.py knows which process holds it.

Torch-free.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import Problem
from configs.schema import Config, run_dir
from pretrain.run.files import read_json

STATES = ("finished", "stopped", "preempted", "diverged", "failed")

# Exit codes of our commands. 75 is EX_TEMPFAIL of sysexits.h: a scheduler may start the same run again.
EXIT_CODE = {"finished": 0, "failed": 1, "diverged": 3, "preempted": 75, "stopped": 130}
EXIT_BROKE, EXIT_BAD_INPUT = 1, 2

# The last file that is written into a checkpoint's folder, after every other file was synced.
COMPLETE = "COMPLETE"
_STEP = re.compile(r"step_(\d{7,})$")

# The names that may be at the top of a run folder. The module's docstring describes each.
NAMES = {
    "config.yaml",
    "provenance.json",
    "metrics.jsonl",
    "experts.jsonl",
    "evaluations.jsonl",
    "events.jsonl",
    "outcome.json",
    "DONE",
    "launch",
    "logs",
    "checkpoints",
    "profile",
    "doctor",
    "huggingface",
    "tensorboard",
    "mlflow",
    "wandb",
    "wandb_id",
    "report.html",
    "lock",
}


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `state`: one of STATES. `why`: the reason in one line. `time`: seconds since the epoch."""

    attempt: int
    state: str
    why: str
    step: int
    consumed_samples: int
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        assert self.state in STATES, f"{self.state} is not one of {STATES}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run folder. Making one creates no file."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def experts(self) -> Path:
        return self.path / "experts.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def mlflow(self) -> Path:
        return self.path / "mlflow"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    def launch_dir(self, attempt: int) -> Path:
        return self.path / "launch" / f"attempt_{attempt:04d}"

    def log_dir(self, attempt: int) -> Path:
        return self.path / "logs" / f"attempt_{attempt:04d}"

    def claimed_attempts(self) -> list[int]:
        """Attempt numbers that a launcher or a rank 0 has taken, ascending. A claimed attempt may never have begun."""
        try:
            names = os.listdir(self.path / "launch")
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"attempt_(\d+)", name)))

    def last_attempt(self) -> int:
        """The number of the newest attempt that rank 0 opened; 0: no attempt was opened."""
        return max((n for n in self.claimed_attempts() if (self.launch_dir(n) / "config.yaml").exists()), default=0)

    def done_step(self) -> int | None:
        """The step at which the run was finished; None: the run isn't finished."""
        value = read_json(self.done)
        step = value.get("step") if isinstance(value, dict) else None
        return step if isinstance(step, int) else None

    def newest_checkpoint_step(self) -> int:
        """The step of the newest complete checkpoint; 0: no checkpoint is complete."""
        return max((step for step, _ in complete_checkpoints(self.checkpoints)), default=0)

    def read_outcome(self) -> Outcome | None:
        """The outcome of the newest attempt that has ended. None: no attempt has, or outcome.json has other fields."""
        value = read_json(self.outcome)
        try:
            return Outcome(**value) if isinstance(value, dict) else None
        except (TypeError, AssertionError):
            return None


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of a checkpoint, complete or not."""
    return checkpoints / f"step_{step:07d}"


def complete_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, newest first. Reads folder listings only."""
    if not checkpoints.is_dir():
        return []
    found = []
    for folder in checkpoints.iterdir():
        match = _STEP.match(folder.name)
        if match and (folder / COMPLETE).exists():
            found.append((int(match[1]), folder))
    return sorted(found, reverse=True)


def unfinished_folders(checkpoints: Path) -> list[Path]:
    """Folders that a crash left in the middle of a save or a deletion. The next attempt deletes them before its first save.

    A save that replaces a checkpoint first renames the old one to `.replaced`. Without its successor such a folder is the
    checkpoint itself and is not listed.
    """
    replaced = [path for path in checkpoints.glob("step_*.replaced") if path.with_suffix("").exists()]
    return sorted([*checkpoints.glob("step_*.partial"), *replaced])


def finished_text(folder: RunFolder, stop_step: int) -> str:
    """The message for a user who starts a finished run again."""
    return f"{folder.path} is finished: step {folder.done_step()} of {stop_step}; to train on, set run.steps higher"


def folder_of(config: Config) -> RunFolder:
    """The run folder of this config."""
    return RunFolder(Path(run_dir(config)))


def is_run_folder(folder: RunFolder) -> bool:
    """Whether an attempt has begun here: events.jsonl or config.yaml exists."""
    return folder.events.exists() or folder.config.exists()


def has_begun(folder: RunFolder) -> bool:
    """Whether an attempt has begun here, or was claimed: there is a run to look at. Raises OSError."""
    return is_run_folder(folder) or bool(folder.claimed_attempts())


def check_run_folder(folder: RunFolder) -> list[Problem]:
    """Problems that forbid a run in this folder. Allowed are a path that doesn't exist, an empty folder and a run folder."""
    path = folder.path
    if not path.exists():
        return []
    if not path.is_dir():
        return [Problem("run.dir", str(path), "must be a folder, it is a file", "choose another run.dir or run.name")]
    if folder.events.exists():
        return []
    try:
        foreign = sorted(name for name in os.listdir(path) if name not in NAMES and not name.startswith("."))
    except OSError as error:
        return [Problem("run.dir", str(path), f"must be readable ({error.strerror})", "change its permissions")]
    if not foreign:
        return []
    shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
    rule = f"must be new, empty or a run folder; this one has no events.jsonl and holds {shown}"
    return [Problem("run.dir", str(path), rule, "choose another run.dir or run.name")]
