"""The state of a run, and why the run is in this state. In: its lifecycle, outcome, Slurm job and last row. Out: (state, why).

Torch-free.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launch.live_process import launcher_is_gone, live_launcher
from launch.slurm.lifecycle import CAUSES, OVER, QUEUED, RESTARTING, RUNNING, RunLifecycle
from launch.slurm.scheduler import SchedulerError, SlurmJob, find_jobs
from pretrain.run.event_rows import recent_events
from pretrain.run.folder import Outcome, RunFolder

_FORGOTTEN = "Slurm no longer knows"


def find_job(life: RunLifecycle) -> tuple[SlurmJob | None, str]:
    """The first live job of the run, or else the newest job that Slurm knows, and the reason to show if there is no job."""
    if not life.jobs:
        return None, ""
    try:
        jobs = list(find_jobs(life.jobs).values())
    except SchedulerError as error:
        return None, f"Slurm does not answer here: {str(error).splitlines()[-1]}"
    live = [job for job in jobs if job.live]
    return (live or jobs[-1:] or [None])[0], f"{_FORGOTTEN} job {life.jobs[-1]}"


def slurm_state(
    life: RunLifecycle, job: SlurmJob | None, silence: str, outcome: Outcome | None, row: dict[str, Any], held: bool
) -> tuple[str, str]:
    """(state, why) of a run with Slurm jobs. `row`: the last row of metrics.jsonl. `held`: an attempt trains in the folder."""
    if life.phase == OVER:
        return life.state, life.why
    # Written by the ranks, also where the batch step was killed before it could record the end.
    ended = outcome if outcome is not None and outcome.attempt == life.attempt and life.phase != QUEUED else None
    if ended is not None and CAUSES.get(ended.state) is not None:
        return ended.state, ended.why
    if job is None and silence.startswith(_FORGOTTEN) and not held:
        return (ended.state, ended.why) if ended is not None else ("died", f"{silence}; its last event was {life.phase}")
    if job is None:
        return {RUNNING: "running", QUEUED: "queued", RESTARTING: "starting"}.get(life.phase, "died"), silence
    if job.state == "PENDING":
        expected = f", expected to start at {job.start}" if job.start else ""
        return "queued", f"{life.why + '; ' if life.why else ''}waits for {job.reason or 'its turn'}{expected}"
    if job.live:
        return ("running" if life.phase == RUNNING and row else "starting"), ""
    if job.state == "CANCELLED":
        return "stopped", "cancelled while it waited" if life.phase == QUEUED else f"job {job.number} was cancelled"
    if ended is not None:
        return ended.state, f"{ended.why}; job {job.number} ended before its batch step could go on; phalanx resume goes on"
    if life.phase == QUEUED:
        return "died", f"job {job.number} ended ({job.state.lower()}) before its batch step began; phalanx logs shows its output"
    if job.state == "TIMEOUT":
        why = f"job {job.number} reached its time limit before the ranks had saved: set a longer launch.slurm.time"
        return "died", f"{why}; phalanx resume goes on"
    return "died", f"job {job.number} is {job.state.lower()}; its last event was {life.phase}"


def job_dict(job: SlurmJob | None, life: RunLifecycle, silence: str) -> dict[str, Any] | None:
    """The job for the JSON document: what Slurm says, or why Slurm says nothing. None for a run without jobs."""
    if job is not None:
        return {**asdict(job), "requeued_excluding": list(life.excluded)}
    return {"unknown": silence} if life.jobs else None


def local_state(folder: RunFolder, attempt: int, outcome: Outcome | None, held: bool, row: dict[str, Any]) -> tuple[str, str]:
    """(state, why) of a run without Slurm jobs. `row`: the last row of metrics.jsonl. `held`: an attempt trains in the folder."""
    if held:
        return ("running" if row else "starting"), ""
    claimed = max(folder.claimed_attempts(), default=0)
    if claimed > attempt and live_launcher(folder) is not None:
        return "starting", f"attempt {claimed} has not begun to train yet"
    if outcome is not None and outcome.attempt == attempt:
        return outcome.state, outcome.why
    if attempt == 0 and launcher_is_gone(folder):
        return "died", f"attempt {claimed} ended before it began to train; phalanx logs shows why"
    if attempt == 0:
        return "starting", "no attempt has begun yet; phalanx logs shows why when it lasts"
    events = recent_events(folder)
    after = f"; its last event was {events[-1]['kind']}" if events else ""
    return "died", f"attempt {attempt} ended without an outcome{after}"
