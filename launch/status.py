"""The status of a run. In: the files of the run folder and, for a Slurm run, Slurm's queue. Out: a `RunStatus`.

The status can be read during the run and after its end, from any host that sees the folder. On a host without Slurm's
commands, the status says that Slurm does not answer.

Torch-free.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import from_yaml_text
from configs.units import duration
from launch.slurm.interruptions import Interruption, interruptions
from launch.slurm.lifecycle import OVER, QUEUED, RUNNING, RunLifecycle, read_lifecycle
from launch.slurm.scheduler import SchedulerError, SlurmJob, find_jobs
from parallel.batch import steps_of
from pretrain.run.events import EventKind
from pretrain.run.files import last_row, recent_rows
from pretrain.run.folder import RunFolder, is_run_folder, live_holder

_ETA_STEPS = 20
_EVENTS = 5
# Every checkpoint writes events of these kinds. They would push rarer events out of the few that are shown.
_QUIET = frozenset({EventKind.SAVED, EventKind.PRUNED})


@dataclass(frozen=True)
class RunStatus:
    """The status of a run. A value that is not known is None.

    `state` is queued, starting, running, the state of an outcome, gave_up, or died. A run died if it ended without an
    outcome. `job` is what Slurm says about the run's job, or why Slurm says nothing. `nodes` are those of the last attempt.
    `events` are the most recent events. Names that end in `_s` are in seconds.
    """

    run_dir: str
    state: str
    why: str
    attempt: int
    step: int
    total_steps: int | None
    loss: float | None
    val_loss: float | None
    tokens: int | None
    tokens_per_s: float | None
    step_time_s: float | None
    eta_s: float | None
    last_row_age_s: float | None
    holder: str | None
    done: bool
    job: dict[str, Any] | None
    nodes: list[str]
    interruptions: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_run_folder(path: str) -> RunFolder:
    """The run folder at `path`. Raises ConfigError if no run has begun there."""
    folder = RunFolder(Path(path))
    if is_run_folder(folder) or folder.claimed_attempts():
        return folder
    found = "nothing is there" if not folder.path.exists() else "it has neither config.yaml nor events.jsonl"
    runs = (
        sorted(str(config.parent) for config in folder.path.parent.glob("*/config.yaml")) if folder.path.parent.is_dir() else []
    )
    fix = (
        f"run folders beside it: {', '.join(runs[:5])}"
        if runs
        else "name the folder that phalanx launch made (run.dir, or runs/NAME)"
    )
    raise ConfigError(Problem("RUN_DIR", path, f"must be a run folder; {found}", fix))


def read_status(folder: RunFolder, now_s: float | None = None) -> RunStatus:
    """The status of the run in `folder`. The age of the last row counts to `now_s`, seconds since the epoch, default now."""
    now_s = time.time() if now_s is None else now_s
    attempt = folder.last_attempt()
    rows = recent_rows(folder.metrics)
    row = rows[-1] if rows else {}
    holder = live_holder(folder)
    life = read_lifecycle(folder)
    job, silence = _job(life)
    state, why = _state(folder, attempt, holder is not None, row) if not life.jobs else _slurm_state(life, job, silence, row)
    total_steps = _total_steps(folder)
    times_s = [r["step_time_s"] for r in rows[-_ETA_STEPS:] if isinstance(r.get("step_time_s"), (int, float))]
    step_time_s = statistics.median(times_s) if times_s else None
    step = row.get("step", 0)
    left = max(0, total_steps - step) if total_steps is not None else None
    return RunStatus(
        run_dir=str(folder.path),
        state=state,
        why=why,
        attempt=max(attempt, life.attempt),
        step=step,
        total_steps=total_steps,
        loss=row.get("loss"),
        val_loss=next((r["val_loss"] for r in reversed(rows) if r.get("val_loss") is not None), None),
        tokens=row.get("tokens"),
        tokens_per_s=row.get("tokens_per_s"),
        step_time_s=step_time_s,
        eta_s=left * step_time_s if left is not None and step_time_s is not None and state == "running" else None,
        last_row_age_s=max(0.0, now_s - folder.metrics.stat().st_mtime) if rows else None,
        holder=holder.describe() if holder else None,
        done=folder.done.exists(),
        job=_job_dict(job, life, silence),
        nodes=list(life.nodes),
        interruptions=[found.as_dict() for found in interruptions(recent_rows(folder.events))] if life.jobs else [],
        events=[event for event in recent_rows(folder.events, 1 << 14) if event.get("kind") not in _QUIET][-_EVENTS:],
    )


def describe(status: RunStatus) -> str:
    """A few aligned lines for people."""
    steps = f"{status.step}/{status.total_steps}" if status.total_steps is not None else str(status.step)
    lines = [
        ("run", status.run_dir),
        ("state", status.state + (f": {status.why}" if status.why else "")),
        ("attempt", f"{status.attempt}" + (f", held by {status.holder}" if status.holder else "")),
        ("step", steps + (f", eta {duration(status.eta_s)}" if status.eta_s is not None else "")),
    ]
    numbers = [
        ("loss", status.loss, "{:.4f}"),
        ("val loss", status.val_loss, "{:.4f}"),
        ("tokens", status.tokens, "{:,}"),
        ("tokens/s", status.tokens_per_s, "{:,.0f}"),
        ("s/step", status.step_time_s, "{:.3f}"),
    ]
    lines += [(name, text.format(value)) for name, value, text in numbers if value is not None]
    if status.job is not None:
        lines.append(("job", _job_text(status.job)))
    if status.nodes:
        lines.append(("nodes", ", ".join(status.nodes[:8]) + (f", … ({len(status.nodes)})" if len(status.nodes) > 8 else "")))
    if status.last_row_age_s is not None and status.state == "running":
        lines.append(("last row", f"{duration(status.last_row_age_s)} ago"))
    broken = [str(Interruption(**found)) for found in status.interruptions[-3:]]
    lines += [("" if index else "interrupted", text) for index, text in enumerate(broken)]
    lines += [("" if index else "events", _event_text(event)) for index, event in enumerate(status.events)]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def as_json(status: RunStatus) -> str:
    return json.dumps(status.as_dict(), indent=2)


def list_runs(parent: Path) -> list[RunStatus]:
    """The runs whose folders lie in `parent`, the one with the newest event first."""
    folders = [RunFolder(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    found = [folder for folder in folders if is_run_folder(folder)]
    return [read_status(folder) for folder in sorted(found, key=lambda folder: folder.events.stat().st_mtime, reverse=True)]


def line_of(status: RunStatus) -> str:
    """One line of a list of runs."""
    steps = f"{status.step}/{status.total_steps}" if status.total_steps is not None else str(status.step)
    loss = f"loss {status.loss:.4f}" if status.loss is not None else ""
    why = f"  {status.why.splitlines()[0]}" if status.why and status.state != "finished" else ""
    return f"{status.run_dir:<32} {status.state:<10} {steps:>13}  {loss}{why}"


def _job(life: RunLifecycle) -> tuple[SlurmJob | None, str]:
    """The first live job of the run, or else the newest job that Slurm knows, and the reason to show if there is no job."""
    if not life.jobs:
        return None, ""
    try:
        jobs = list(find_jobs(life.jobs).values())
    except SchedulerError as error:
        return None, f"Slurm does not answer here: {str(error).splitlines()[-1]}"
    live = [job for job in jobs if job.live]
    return (live or jobs[-1:] or [None])[0], f"Slurm no longer knows job {life.jobs[-1]}"


def _slurm_state(life: RunLifecycle, job: SlurmJob | None, silence: str, row: dict[str, Any]) -> tuple[str, str]:
    if life.phase == OVER:
        return life.state, life.why
    if job is None:
        return {RUNNING: "running", QUEUED: "queued"}.get(life.phase, "died"), silence
    if job.state == "PENDING":
        expected = f", expected to start at {job.start}" if job.start else ""
        return "queued", f"{life.why + '; ' if life.why else ''}waits for {job.reason or 'its turn'}{expected}"
    if job.live:
        return ("running" if life.phase == RUNNING and row else "starting"), ""
    if job.state == "CANCELLED":
        return "stopped", "cancelled while it waited" if life.phase == QUEUED else f"job {job.number} was cancelled"
    if life.phase == QUEUED:
        return "died", f"job {job.number} ended ({job.state.lower()}) before its batch step began; phalanx logs shows its output"
    if job.state == "TIMEOUT":
        why = f"job {job.number} reached its time limit before the ranks had saved: set a longer launch.slurm.time"
        return "died", f"{why}; phalanx resume goes on"
    return "died", f"job {job.number} is {job.state.lower()}; its last event was {life.phase}"


def _job_dict(job: SlurmJob | None, life: RunLifecycle, silence: str) -> dict[str, Any] | None:
    """The job for the JSON document: what Slurm says, or why Slurm says nothing. None for a run without jobs."""
    if job is not None:
        return {**asdict(job), "requeued_excluding": list(life.excluded)}
    return {"unknown": silence} if life.jobs else None


def _job_text(job: dict[str, Any]) -> str:
    if "unknown" in job:
        return job["unknown"]
    words = [f"{job['number']} {job['state'].lower()}"]
    words += [f"on {job['nodes']}"] if job["nodes"] else []
    words += [f"without {', '.join(job['requeued_excluding'])}"] if job["requeued_excluding"] else []
    return ", ".join(words)


def _event_text(event: dict[str, Any]) -> str:
    clock = time.strftime("%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
    shown = [(name, value) for name, value in event.items() if name not in ("time", "kind", "attempt")]
    words = " ".join(f"{name}={value}" for name, value in shown if value not in ("", None, [])).splitlines() or [""]
    return f"{clock}  #{event.get('attempt', 0)} {event['kind']}  {words[0][:120]}"


def _state(folder: RunFolder, attempt: int, held: bool, row: dict[str, Any]) -> tuple[str, str]:
    if held:
        return ("running" if row else "starting"), ""
    outcome = folder.read_outcome()
    if outcome is not None and outcome.attempt == attempt:
        return outcome.state, outcome.why
    if attempt == 0:
        return "starting", "no attempt has begun yet; phalanx logs shows why when it lasts"
    event = last_row(folder.events)
    after = f"; its last event was {event['kind']}" if event is not None and "kind" in event else ""
    return "died", f"attempt {attempt} ended without an outcome{after}"


def _total_steps(folder: RunFolder) -> int | None:
    if not folder.config.exists():
        return None
    try:
        config = from_yaml_text(folder.config.read_text(), str(folder.config))
    except ConfigError:
        # Another version of the schema wrote this config. The rest of the status is still valid.
        return None
    return steps_of(config) if config.run.steps is not None or config.run.tokens is not None else None
