"""Opening and closing an attempt. In: the run folder and the resolved config. Out: an `Attempt` that holds it. Rank 0 only.

An attempt works alike under plain torchrun and under our launchers. The lock decides which process trains, and rank 0 numbers
the attempt. A launcher needs the number earlier, to name its log folder. It claims one and passes it in PHALANX_ATTEMPT.

Torch-free.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.errors import ConfigError, Problem
from pretrain.run.event_log import append_event, mend_events, sync_events
from pretrain.run.events import EventKind
from pretrain.run.files import read_json, storage_error, write_atomically, write_json
from pretrain.run.folder import Outcome, RunFolder, check_run_folder
from pretrain.run.lock import FolderLock, acquire, read_holder
from pretrain.run.process import process_age_s

# Takes the config text of the previous attempt (None: a new run). Returns the problems that forbid a resume from it.
MayGoOn = Callable[[str | None], Sequence[Problem]]


class Attempt:
    """An attempt that holds its run folder and alone writes its records. As a context manager it frees the folder at its end."""

    def __init__(self, folder: RunFolder, number: int, lock: FolderLock) -> None:
        self.folder = folder
        self.number = number
        self._lock = lock
        self._closed = False

    @property
    def own_dir(self) -> Path:
        """The folder that only this attempt writes: its config, its command, the rows that it cut from the record."""
        return self.folder.launch_dir(self.number)

    @property
    def wandb_id(self) -> str:
        """The id of the run's W&B run. Going back to an earlier checkpoint gives the run another one."""
        return self.folder.wandb_id.read_text().strip()

    def event(self, kind: EventKind, time_s: float | None = None, /, **fields: Any) -> None:
        """Append one line to events.jsonl. `time_s`: when it happened; None: now. Raises ConfigError when the disk refuses it."""
        try:
            append_event(self.folder, self.number, kind, time_s, **fields)
        except OSError as error:
            raise storage_error("run.dir", self.folder.events, error) from error

    def check_held(self) -> None:
        """Raises ConfigError when the lock file was removed or replaced, because another attempt may then write here.

        Call it before each save.
        """
        if not self._lock.is_ours():
            rule = "the attempt must hold its run folder; the lock file was removed or replaced while it trained"
            fix = "see which attempt is the right one and end the other"
            raise ConfigError(Problem("run.dir", str(self.folder.path), rule, fix))

    def finish(self, outcome: Outcome, **fields: Any) -> None:
        """Write outcome.json, the outcome event and, for a finished run, DONE. `fields`: further fields of the event.

        Raises ConfigError when the disk refuses them.
        """
        assert outcome.attempt == self.number, f"outcome of attempt {outcome.attempt} written by attempt {self.number}"
        try:
            write_json(self.folder.outcome, outcome.as_dict())
            if outcome.state == "finished":
                write_json(self.folder.done, {"attempt": self.number, "step": outcome.step})
        except OSError as error:
            raise storage_error("run.dir", self.folder.path, error) from error
        self.event(EventKind.OUTCOME, state=outcome.state, why=outcome.why, step=outcome.step, **fields)

    def close(self) -> None:
        """Free the folder for the next attempt. Raises ConfigError when the disk refuses. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            try:
                sync_events(self.folder)
            finally:
                self._lock.release()
        except OSError as error:
            raise storage_error("run.dir", self.folder.path, error) from error

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_attempt(
    folder: RunFolder,
    config_yaml: str,
    provenance: Mapping[str, Any],
    environ: Mapping[str, str],
    may_go_on: MayGoOn = lambda _: (),
    resume_step: int | None = None,
) -> Attempt:
    """Take the folder and begin an attempt in it. `resume_step`: checkpoint.resume_step of the config, which the event keeps.

    Raises ConfigError when the folder is no run folder, is held, is read-only or full, or when `may_go_on` returns problems.
    Nothing of the run changes before these checks have passed, so a refused attempt never replaces the run's config.
    """
    if problems := check_run_folder(folder):
        raise ConfigError(problems)
    try:
        for part in (folder.path, folder.path / "launch", folder.path / "logs", folder.checkpoints, folder.wandb):
            part.mkdir(parents=True, exist_ok=True)
        lock = acquire(folder)
        try:
            return _open_held(folder, lock, config_yaml, provenance, environ, may_go_on, resume_step)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise storage_error("run.dir", folder.path, error) from error


def _open_held(
    folder: RunFolder,
    lock: FolderLock,
    config_yaml: str,
    provenance: Mapping[str, Any],
    environ: Mapping[str, str],
    may_go_on: MayGoOn,
    resume_step: int | None,
) -> Attempt:
    before = folder.config.read_text() if folder.config.exists() else None
    if problems := list(may_go_on(before)):
        raise ConfigError(problems)
    torn_bytes = mend_events(folder)
    previous, last_sign = folder.last_attempt(), _last_sign(folder)
    number = _allocate(folder, environ)
    lock.hold(number)
    wandb_id = _keep_wandb_id(folder, environ)
    own = folder.launch_dir(number)
    provenance_text = json.dumps(dict(provenance), indent=2) + "\n"
    for path, text in (
        (own / "provenance.json", provenance_text),
        (folder.provenance, provenance_text),
        (own / "config.yaml", config_yaml),
        (folder.config, config_yaml),
    ):
        write_atomically(path, text)
    # A resumed run is no longer finished. Without DONE, a crash from here on doesn't look like a finished run.
    folder.done.unlink(missing_ok=True)
    attempt = Attempt(folder, number, lock)
    attempt.event(
        EventKind.ATTEMPT,
        wandb_id=wandb_id,
        logs=environ.get("PHALANX_LOG_DIR"),
        slurm_job=environ.get("SLURM_JOB_ID"),
        resume_step=resume_step,
        began=round(_began_s(own), 3),
    )
    if torn_bytes:
        attempt.event(EventKind.EVENTS_MENDED, cut_bytes=torn_bytes)
    outcome = folder.read_outcome()
    if previous and (outcome is None or outcome.attempt != previous):
        known = {"last_sign": round(last_sign, 3)} if last_sign is not None else {}
        attempt.event(EventKind.NO_OUTCOME, of_attempt=previous, **known)
    return attempt


def _allocate(folder: RunFolder, environ: Mapping[str, str]) -> int:
    """The attempt's number: the number that the launcher claimed when no later attempt has begun, else the next free number."""
    begun = folder.last_attempt()
    hint = environ.get("PHALANX_ATTEMPT", "")
    if hint.isdecimal() and int(hint) > begun:
        number = int(hint)
        folder.launch_dir(number).mkdir(parents=True, exist_ok=True)
        return number
    number = max([0, *folder.claimed_attempts()]) + 1
    folder.launch_dir(number).mkdir(parents=True)
    return number


def _last_sign(folder: RunFolder) -> float | None:
    """When the attempt before touched the lock file last, in seconds since the epoch. None: it did not die with the lock."""
    holder = read_holder(folder)
    if holder is None or holder.released or holder.attempt != folder.last_attempt():
        return None
    return folder.lock.stat().st_mtime


def _began_s(own_dir: Path) -> float:
    """When the attempt's launcher, else this process, began, in seconds since the epoch."""
    launcher = read_json(own_dir / "launcher.json")
    began_s = launcher.get("time") if isinstance(launcher, dict) else None
    return float(began_s) if isinstance(began_s, (int, float)) else time.time() - process_age_s(os.getpid())


def _keep_wandb_id(folder: RunFolder, environ: Mapping[str, str]) -> str:
    """One W&B run for all attempts: the id in the folder, else WANDB_RUN_ID, else a new one."""
    if folder.wandb_id.exists() and (known := folder.wandb_id.read_text().strip()):
        return known
    wandb_id = environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_atomically(folder.wandb_id, wandb_id + "\n")
    return wandb_id
