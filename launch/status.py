"""The status of a run. In: the files of the run folder and, for a Slurm run, Slurm's queue. Out: a `RunStatus`.

The status can be read during the run and after its end, from any host that sees the folder. On a host without Slurm's
commands, the status says that Slurm does not answer. `damage` names what is damaged in the folder; all other values are valid.

Torch-free.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem, json_value
from configs.fields import check_keys
from configs.load import from_yaml_text
from launch.folder_files import check_files, disk_trouble
from launch.run_state import find_job, job_dict, local_state, slurm_state
from launch.slurm.interruptions import interruptions
from launch.slurm.lifecycle import RunLifecycle, advance
from parallel.batch import steps_of
from pretrain.metrics.goodput import TimeLedger, record_seconds
from pretrain.metrics.wandb_steps import read_copy_state
from pretrain.run.event_rows import recent_events, scan_events
from pretrain.run.events import EventKind
from pretrain.run.files import recent_rows, storage_problem
from pretrain.run.folder import RunFolder, has_begun
from pretrain.run.lock import live_holder

# A run in one of these states may still change.
LIVE_STATES = ("queued", "starting", "running")
_ETA_STEPS = 20
# No number of a run is larger. What is larger is damage, and Python could not even convert it.
_MOST = 1e18
_EVENTS = 5
# Every checkpoint writes events of these kinds. They would push rarer events out of the few that are shown.
QUIET = frozenset({EventKind.SAVED, EventKind.PRUNED})


@dataclass(frozen=True)
class RunStatus:
    """The status of a run. A value that is not known is None.

    `val_losses` are the newest losses of the sets of data.valid_sets, by name.
    `state` is queued, starting, running, the state of an outcome, gave_up, died, or unreadable. A run died if it ended without
    an outcome. `goodput` is the whole run's time by what it was spent on (pretrain/metrics/goodput.py), `wandb` how far W&B's
    copy is (pretrain/metrics/wandb_steps.py). `job` is what Slurm says about the run's job, or why Slurm says nothing. `nodes`
    are those of the last attempt. `events` are the most recent events. `age_s` is the time since the newest sign of life.
    `damage` tells what is wrong with files of the folder. Names that end in `_s` are in seconds.
    """

    run_dir: str
    state: str
    why: str
    attempt: int = 0
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    val_losses: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None
    tokens_per_s: float | None = None
    step_time_s: float | None = None
    eta_s: float | None = None
    last_row_age_s: float | None = None
    age_s: float | None = None
    holder: str | None = None
    done: bool = False
    job: dict[str, Any] | None = None
    nodes: list[str] = field(default_factory=list)
    interruptions: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    goodput: dict[str, float] | None = None
    wandb: dict[str, Any] | None = None

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_run_folder(path: str) -> RunFolder:
    """The run folder at `path`. Raises ConfigError if no run has begun there, or if its files can't be read without harm."""
    folder = RunFolder(Path(path))
    try:
        if has_begun(folder):
            if problems := check_files(folder):
                raise ConfigError(problems)
            return folder
    except OSError as error:
        raise ConfigError(storage_problem("RUN_DIR", path, error)) from error
    found = "it has neither config.yaml nor events.jsonl" if folder.path.is_dir() else "it is a file"
    found = found if folder.path.exists() else "nothing is there"
    runs = (
        sorted(str(config.parent) for config in folder.path.parent.glob("*/config.yaml")) if folder.path.parent.is_dir() else []
    )
    fix = (
        f"run folders beside it: {', '.join(runs[:5])}"
        if runs
        else "name the folder that phalanx launch made (run.dir, or runs/NAME)"
    )
    raise ConfigError(Problem("RUN_DIR", path, f"must be a run folder; {found}", fix))


def ask_always(life: RunLifecycle) -> bool:
    """Slurm is asked about every run that has jobs."""
    return True


def read_status(
    folder: RunFolder,
    now_s: float | None = None,
    ask_slurm: Callable[[RunLifecycle], bool] = ask_always,
    is_whole: bool = False,
) -> RunStatus:
    """The status of the run in `folder`. The age of the last row counts to `now_s`, seconds since the epoch, default now.

    `ask_slurm`: whether the queue is asked about a run with this lifecycle. `is_whole`: search the whole record for step times,
    and look how far W&B's copy is. Raises ConfigError if a file of the folder can't be read.
    """
    try:
        if problems := check_files(folder):
            raise ConfigError(problems)
        return _read_status(folder, time.time() if now_s is None else now_s, ask_slurm, is_whole)
    except OSError as error:
        raise ConfigError(storage_problem("RUN_DIR", folder.path, error)) from error


def _read_status(folder: RunFolder, now_s: float, ask_slurm: Callable[[RunLifecycle], bool], is_whole: bool) -> RunStatus:
    attempt = folder.last_attempt()
    rows = recent_rows(folder.metrics)
    row = rows[-1] if rows else {}
    holder = live_holder(folder)
    life, ledger, damaged = _read_events(folder)
    job, silence = find_job(life) if ask_slurm(life) else (None, "Slurm was not asked")
    held = holder is not None
    outcome = None if held else folder.read_outcome()
    if life.jobs:
        state, why = slurm_state(life, job, silence, outcome, row, held)
    else:
        state, why = local_state(folder, attempt, outcome, held, row)
    total_steps, damage = _total_steps(folder)
    if damaged:
        damage.append(f"events.jsonl: {damaged} lines are no events" if damaged > 1 else "events.jsonl: 1 line is no event")
    if rows and not isinstance(row.get("step"), int):
        damage.append("metrics.jsonl: the last row has no step")
    if not rows and folder.metrics.exists() and folder.metrics.stat().st_size:
        damage.append("metrics.jsonl: no rows at its end")
    if held:
        damage += disk_trouble(folder)
    step_times_s = [value for r in rows[-_ETA_STEPS:] if (value := _number(r, "step_time_s")) is not None]
    step_time_s = statistics.median(step_times_s) if step_times_s else None
    step = int(_number(row, "step") or 0)
    left = max(0, total_steps - step) if total_steps is not None else None
    last_s = last_sign_s(folder)
    goodput = copied = None
    if is_whole:
        copied = read_copy_state(folder, step, held)
        goodput = ledger.goodput(*record_seconds(folder), now_s if state in LIVE_STATES or last_s is None else last_s)
    return RunStatus(
        run_dir=str(folder.path),
        state=state,
        why=why,
        attempt=max(attempt, life.attempt),
        step=step,
        total_steps=total_steps,
        loss=_number(row, "loss"),
        val_loss=next((loss for r in reversed(rows) if (loss := _number(r, "val_loss")) is not None), None),
        val_losses={
            key.removeprefix("val_loss/"): loss
            for r in rows
            for key in r
            if key.startswith("val_loss/") and (loss := _number(r, key)) is not None
        },
        tokens=None if (tokens := _number(row, "tokens")) is None else int(tokens),
        tokens_per_s=_number(row, "tokens_per_s"),
        step_time_s=step_time_s,
        eta_s=left * step_time_s if left is not None and step_time_s is not None and state == "running" else None,
        last_row_age_s=max(0.0, now_s - folder.metrics.stat().st_mtime) if rows else None,
        age_s=None if last_s is None else max(0.0, now_s - last_s),
        holder=holder.describe() if holder else None,
        done=folder.done.exists(),
        job=job_dict(job, life, silence),
        nodes=list(life.nodes),
        interruptions=[found.as_dict() for found in interruptions(recent_events(folder))] if life.jobs else [],
        events=[event for event in recent_events(folder, 1 << 14) if event["kind"] not in QUIET][-_EVENTS:],
        damage=damage,
        goodput=goodput.as_dict() if goodput is not None else None,
        wandb=copied.as_dict() if copied is not None else None,
    )


def _read_events(folder: RunFolder) -> tuple[RunLifecycle, TimeLedger, int]:
    """(the lifecycle, the run's time, the lines of events.jsonl that are no event), in one pass over the file."""
    life, ledger, damaged = RunLifecycle(), TimeLedger(), 0
    for event in scan_events(folder):
        if event is None:
            damaged += 1
        else:
            life = advance(life, event)
            ledger.add(event)
    return life, ledger, damaged


def last_sign_s(folder: RunFolder) -> float | None:
    """When the run was last seen at work, in seconds since the epoch. None: nobody can see."""
    times_s = []
    for path in (folder.metrics, folder.events, folder.lock, folder.config, folder.path):
        try:
            times_s.append(path.stat().st_mtime)
        except OSError:
            # Absent, or not for this user's eyes: the others count.
            continue
        if path in (folder.config, folder.path):
            break
    return max(times_s, default=None)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """The finite number of this name. None: the row has none."""
    value = row.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST
    return value if is_number else None


def as_json(found: RunStatus | list[RunStatus]) -> str:
    """One JSON document: the object of a run, or the list of the objects of runs."""
    value = [status.as_dict() for status in found] if isinstance(found, list) else found.as_dict()
    # Events of another version may hold any value.
    return json.dumps(json_value(value), indent=2, allow_nan=False)


def _total_steps(folder: RunFolder) -> tuple[int | None, list[str]]:
    """(the steps that the config asks for, if it says so; what is wrong with the config)."""
    if not folder.config.exists():
        return None, []
    try:
        config = from_yaml_text(folder.config.read_text(encoding="utf-8"), str(folder.config))
        if problems := check_keys(config):
            raise ConfigError(problems)
    except UnicodeDecodeError:
        return None, ["config.yaml: is no text"]
    except ConfigError as error:
        # Another version of the schema wrote this config, or it is damaged. The rest of the status is still valid.
        first = error.problems[0]
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        return None, [f"config.yaml: {first.path}: {first.rule}{more}"]
    return (steps_of(config) if config.run.steps is not None or config.run.tokens is not None else None), []
