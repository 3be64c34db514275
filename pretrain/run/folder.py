"""The run folder as a contract: its names, what may lie in it, who holds it. Reads only; pretrain/run/attempt.py writes.

runs/NAME/
    config.yaml        resolved config of the newest attempt
    provenance.json    origin of each value, code and package versions, host
    metrics.jsonl      the record: one row a step, each step once over all attempts
    events.jsonl       attempts, saves, signals, verdicts: one JSON object a line
    outcome.json       how the last attempt ended          DONE   the run is finished
    launch/attempt_0001/   config.yaml, provenance.json, command.sh, launcher.json of each attempt
    logs/attempt_0001/     rank_0.log …, torchrun.log, rank_3.failure.json, stacks.txt; on large runs one NODE.log a node
    checkpoints/       step_0000100/ …
    wandb/             W&B's own files, and cursor.json
    doctor/            0001/ …: what phalanx doctor found out here
    huggingface/       the newest checkpoint for transformers, where it was exported here (make demo)
    wandb_id           the one W&B run that all attempts share
    lock               who trains here now

Torch-free.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import Problem
from configs.schema import Config, run_dir
from pretrain.run.files import read_json

STATES = ("finished", "stopped", "preempted", "diverged", "failed")

# What our commands return. 75 is sysexits' EX_TEMPFAIL, "try again": a scheduler may start the run again as it is.
EXIT_CODE = {"finished": 0, "failed": 1, "diverged": 3, "preempted": 75, "stopped": 130}
EXIT_BROKE, EXIT_BAD_INPUT = 1, 2

# A holder on another host touches the lock every few seconds; silent for this long, it is dead.
HEARTBEAT_S = 5.0
SILENCE_S = 4 * HEARTBEAT_S

# Written last into a checkpoint's folder, after everything else was synced.
COMPLETE = "COMPLETE"
_STEP = re.compile(r"step_(\d{7,})$")

_NAMES = {
    "config.yaml",
    "provenance.json",
    "metrics.jsonl",
    "events.jsonl",
    "outcome.json",
    "DONE",
    "launch",
    "logs",
    "checkpoints",
    "doctor",
    "huggingface",
    "wandb",
    "wandb_id",
    "lock",
}


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `why` is one line for people; `time` in seconds since the epoch."""

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
class Holder:
    """Who trains (or trained) in a run folder: rank 0's process. `start_ticks` tells it from a later process of that pid."""

    host: str
    pid: int
    attempt: int
    start_ticks: int
    released: bool = False

    def describe(self) -> str:
        return f"attempt {self.attempt}, process {self.pid} on {self.host}"


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run folder. Nothing is created."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

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
    def wandb(self) -> Path:
        return self.path / "wandb"

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
        """Numbers taken by a launcher or a rank 0, ascending; a claimed attempt may never have begun."""
        try:
            names = os.listdir(self.path / "launch")
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"attempt_(\d+)", name)))

    def last_attempt(self) -> int:
        """The newest attempt that rank 0 opened; 0: none."""
        return max((n for n in self.claimed_attempts() if (self.launch_dir(n) / "config.yaml").exists()), default=0)

    def done_step(self) -> int | None:
        """The step at which the run was finished; None: it isn't."""
        value = read_json(self.done)
        step = value.get("step") if isinstance(value, dict) else None
        return step if isinstance(step, int) else None

    def newest_checkpoint_step(self) -> int:
        """The step of the newest complete checkpoint; 0: there is none."""
        return max((step for step, _ in complete_checkpoints(self.checkpoints)), default=0)

    def read_outcome(self) -> Outcome | None:
        """How the newest ended attempt ended. None: none has, or the file isn't one of ours."""
        value = read_json(self.outcome)
        try:
            return Outcome(**value) if isinstance(value, dict) else None
        except (TypeError, AssertionError):
            return None


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:07d}"


def complete_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, newest first. Nothing is opened but folders."""
    if not checkpoints.is_dir():
        return []
    found = []
    for folder in checkpoints.iterdir():
        match = _STEP.match(folder.name)
        if match and (folder / COMPLETE).exists():
            found.append((int(match[1]), folder))
    return sorted(found, reverse=True)


def finished_text(folder: RunFolder, stop_step: int) -> str:
    """What is said to someone who starts a finished run again."""
    return f"{folder.path} is finished: step {folder.done_step()} of {stop_step}; to train on, set run.steps higher"


def folder_of(config: Config) -> RunFolder:
    """The run folder of this config."""
    return RunFolder(Path(run_dir(config)))


def is_run_folder(folder: RunFolder) -> bool:
    """Somebody trained here."""
    return folder.events.exists() or folder.config.exists()


def check_run_folder(folder: RunFolder) -> list[Problem]:
    """May a run live here? Absent, empty, or a run folder; not a file, nor a folder of something else."""
    path = folder.path
    if not path.exists():
        return []
    if not path.is_dir():
        return [Problem("run.dir", str(path), "must be a folder, it is a file", "choose another run.dir or run.name")]
    if folder.events.exists():
        return []
    try:
        foreign = sorted(name for name in os.listdir(path) if name not in _NAMES and not name.startswith("."))
    except OSError as error:
        return [Problem("run.dir", str(path), f"must be readable ({error.strerror})", "change its permissions")]
    if not foreign:
        return []
    shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
    rule = f"must be new, empty or a run folder; this one has no events.jsonl and holds {shown}"
    return [Problem("run.dir", str(path), rule, "choose another run.dir or run.name")]


def process_start_ticks(pid: int) -> int:
    """Start time of a live process in clock ticks since boot; 0: there is no such process (or no /proc)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields_after_name = text.rpartition(")")[2].split()
    return int(fields_after_name[19]) if fields_after_name[0] != "Z" else 0


def read_holder(folder: RunFolder) -> Holder | None:
    """What the lock file says, alive or not. None: no lock file, or one that was cut short."""
    value = read_json(folder.lock)
    try:
        return Holder(**value) if isinstance(value, dict) else None
    except TypeError:
        return None


def holder_text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode() + b"\n"


def live_holder(folder: RunFolder) -> Holder | None:
    """Who trains here now, by the kernel's lock and, for another host, by the age of its heartbeat. None: nobody."""
    holder = read_holder(folder)
    if _kernel_says_held(folder.lock):
        return holder or Holder("unknown", 0, 0, 0)
    if holder is None or holder.released or holder.host == socket.gethostname():
        return None
    # The kernel's lock may not reach other hosts (NFS with local_lock): there the heartbeat decides.
    return holder if time.time() - folder.lock.stat().st_mtime < SILENCE_S else None


def held_problem(folder: RunFolder, holder: Holder) -> Problem:
    """The refusal of a second live attempt."""
    return Problem(
        "run.dir",
        str(folder.path),
        f"one live attempt a run folder; it is held by {holder.describe()}",
        f"wait for it, end it (phalanx cancel {folder.path}), or choose another run.dir; "
        f"if you know that it is dead: rm {folder.lock}",
    )


def _kernel_says_held(lock: Path) -> bool:
    """Is an exclusive flock on the file now? A shared one is taken for an instant; takers of the lock try again."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
