"""Ends a live run. In: the run folder. Out: a request to the Slurm job, the launcher or rank 0 of the run, then a wait.

A Slurm job is asked through Slurm, from any host. A process is signalled only if it is the one in the record
(launch/live_process.py).

Torch-free.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from configs.errors import ConfigError, Problem
from launch.live_process import is_live, live_launcher
from launch.slurm import scheduler
from launch.slurm.lifecycle import OVER, QUEUED, RunLifecycle, read_lifecycle
from launch.slurm.scheduler import SchedulerError
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.folder import EXIT_CODE, RunFolder
from pretrain.run.lock import live_holder

POLL_S = 0.2
# Each poll of a job is a request to Slurm's controller, so jobs are polled less often than processes.
JOB_POLL_S = 1.0


def cancel(folder: RunFolder, wait_s: float, at_once: bool = False) -> str:
    """Ask the run to save and stop, and wait for its end for at most `wait_s` seconds. Returns a sentence on what happened.

    With `at_once`, scancel ends a Slurm job. The ranks then have Slurm's KillWait, often 30 s, to save. Raises ConfigError
    if Slurm does not answer, or if a local run is live on another host.
    """
    life = read_lifecycle(folder)
    if life.jobs and life.phase != OVER:
        try:
            return _cancel_jobs(folder, life, wait_s, at_once)
        except SchedulerError as error:
            fix = "run it on a host with Slurm's commands, or scancel the job yourself"
            raise ConfigError(Problem("RUN_DIR", str(folder.path), f"Slurm must answer: {error}", fix)) from error
    target = find_process(folder)
    if target is None:
        return "nothing to cancel: no attempt is live in this folder"
    name, pid = target
    with suppress(ProcessLookupError):
        # It may have ended meanwhile, as the loop below then sees.
        os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if live_holder(folder) is None and find_process(folder) is None:
            outcome = folder.read_outcome()
            return f"{outcome.state} at step {outcome.step}: {outcome.why}" if outcome else "ended before it had begun to train"
        time.sleep(POLL_S)
    return f"asked {name} (process {pid}) to save and stop; it still saves. Again after 5 s ends it at once."


def _cancel_jobs(folder: RunFolder, life: RunLifecycle, wait_s: float, at_once: bool) -> str:
    jobs = [job for job in scheduler.find_jobs(life.jobs).values() if job.live]
    if not jobs:
        return "nothing to cancel: no job of this run is live"
    waiting = [job.number for job in jobs if job.state == "PENDING"]
    running = [job.number for job in jobs if job.state != "PENDING"]
    # While modules and prologue run, the batch script takes no SIGINT, and there is nothing to save.
    at_once = at_once or life.phase == QUEUED
    if waiting or at_once:
        scheduler.cancel([*waiting, *(running if at_once else [])])
    if not running:
        return _end_queued(folder, life, waiting, "cancelled while it waited")
    if not at_once:
        for number in running:
            _ask_to_stop(number)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        live = [job for job in scheduler.find_jobs(running).values() if job.live]
        if not live:
            return _ended(folder, running)
        if back := [job.number for job in live if job.state == "PENDING"]:
            # The batch step was about to requeue the job when the request came.
            scheduler.cancel(back)
        time.sleep(JOB_POLL_S)
    numbers = ", ".join(map(str, running))
    if at_once:
        return f"cancelled job {numbers}; it has not ended yet"
    return f"asked job {numbers} to save and stop; it still saves. --now ends it by scancel."


def _ask_to_stop(number: int) -> None:
    """Send SIGINT to the batch step. A job that has just ended needs none. Raises SchedulerError."""
    try:
        scheduler.signal_batch(number, "INT")
    except SchedulerError:
        if any(job.live for job in scheduler.find_jobs([number]).values()):
            raise


def _ended(folder: RunFolder, jobs: list[int]) -> str:
    life = read_lifecycle(folder)
    if life.phase == QUEUED:
        return _end_queued(folder, life, jobs, "cancelled before its batch step began")
    if life.phase == OVER:
        return f"{life.state}: {life.why}"
    return f"job {', '.join(map(str, jobs))} has ended without a record of its end; see phalanx status {folder.path}"


def _end_queued(folder: RunFolder, life: RunLifecycle, jobs: list[int], why: str) -> str:
    """Record the end of a run whose job has been cancelled without an attempt. Such a job cannot record it itself."""
    append_event(folder, life.attempt, EventKind.JOB_OVER, state="stopped", exit_code=EXIT_CODE["stopped"], why=why)
    return f"stopped: job {', '.join(map(str, jobs))} was {why}"


def find_process(folder: RunFolder) -> tuple[str, int] | None:
    """The name and pid of the process to signal: the launcher, or else rank 0. None if no attempt is live.

    Raises ConfigError if the run is live on another host.
    """
    if (pid := live_launcher(folder)) is not None:
        return "the launcher", pid
    holder = live_holder(folder)
    if holder is None:
        return None
    if is_live({"host": holder.host, "pid": holder.pid, "start_ticks": holder.start_ticks}):
        return "rank 0", holder.pid
    rule = f"a local run is cancelled on its own host; this one is held by {holder.describe()}"
    raise ConfigError(Problem("RUN_DIR", str(folder.path), rule, f"run phalanx cancel on {holder.host}"))
