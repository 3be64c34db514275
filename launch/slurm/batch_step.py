"""The batch step of a Slurm job: python -m launch.slurm.batch_step JOB_DIR -- srun …

It claims an attempt, runs it (launch/slurm/attempt.py), and then decides: the next attempt starts in the same allocation, the
run is over, the job is requeued, or Slurm requeues it by itself. All knowledge of earlier attempts comes from events.jsonl, so
the batch step may be killed at any moment and started on other nodes. Only the standard library and light modules are imported.

Torch-free.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from configs.errors import ConfigError, DiskError
from launch.disk_wait import wait_for_disk
from launch.local.run import claim_attempt
from launch.slurm import node_states, scheduler
from launch.slurm.attempt import SIGNAL_REQUESTS, JobAttempt, JobContext
from launch.slurm.clock import TimeLimitClock
from launch.slurm.host_guard import HostGuard
from launch.slurm.job_file import SCRIPT_NAME, JobFile
from launch.slurm.lifecycle import ENDED, OVER, Allocation, NextAction, RequeuePolicy, RunLifecycle, decide, read_lifecycle
from launch.slurm.scheduler import SchedulerError
from launch.slurm.standby_step import StandbyStep
from pretrain.rank.log_file import guard_logs
from pretrain.run.decision import pending_step
from pretrain.run.events import EventKind
from pretrain.run.files import check_room
from pretrain.run.folder import EXIT_BAD_INPUT, EXIT_BROKE, RunFolder
from pretrain.run.lock import SILENCE_S, live_holder

# The batch script sets this variable when SIGUSR1 comes before the batch step has begun.
EARLY_SIGNAL = "PHALANX_SIGNALLED"
# A restarted controller is back within minutes. Waiting longer would hold the nodes for nothing.
REQUEUE_PATIENCE_S = 600.0
# The lock of a rank 0 that died with its node may be taken once its heartbeat has been silent long enough.
HOLDER_PATIENCE_S = 2 * SILENCE_S
# The standby's agents end within this time. Slurm may be about to kill this process.
STANDBY_END_S = 2.0


def run(context: JobContext) -> int:
    """The whole batch step; returns its exit code."""
    folder, spec = context.folder, context.spec
    life = read_lifecycle(folder)
    if refusal := _refusal(context, life):
        # No event is written: the record belongs to the run that is alive.
        context.log(refusal)
        return EXIT_BAD_INPUT
    if context.job not in life.jobs or life.phase == OVER:
        # Submitted by hand, or requeued by an administrator after the run was over.
        context.record(life.attempt, EventKind.JOB_SUBMITTED, jobs=[context.job])
    done = folder.done_step()
    if done is not None and done >= spec.stop_step and pending_step(folder, spec.resume_step) is None:
        return carry_out(context, NextAction("over", f"finished at step {done}", "finished"))
    life = read_lifecycle(folder)
    if life.lost:
        JobAttempt(context, life.lost).post_mortem(life)
        life = read_lifecycle(folder)
    if life.phase == ENDED:
        # The previous attempt had no time to decide, or left the requeue to Slurm.
        decision = decide(life, spec.policy, slurm_requeues=True)
        if decision.action != "wait":
            return carry_out(context, decision)
        context.record(life.attempt, EventKind.JOB_REQUEUED, why=decision.why, exclude=[])
    allocation = Allocation(tuple(scheduler.expand(context.environ["SLURM_JOB_NODELIST"])), spec.sizes)
    nodes = allocation.choose()
    if not nodes:
        why = f"Slurm gave {len(allocation.nodes)} nodes; layout and batch need one of {', '.join(map(str, spec.sizes))}"
        return carry_out(context, NextAction("over", why, "bad_input"))
    try:
        decision = _train(context, allocation, nodes)
    except DiskError:
        raise
    except ConfigError as error:
        decision = NextAction("over", str(error), "gave_up")
    # A step that still runs when the batch step ends is cancelled, and the job's output would say so.
    context.standby.drop(STANDBY_END_S)
    if decision.action == "requeue" and context.is_ended_by_user():
        decision = NextAction("over", f"asked to end before it went back to the queue: {decision.why}", "stopped")
    return carry_out(context, decision)


def _train(context: JobContext, allocation: Allocation, nodes: tuple[str, ...]) -> NextAction:
    """Attempts in this allocation, the first one on `nodes`, until something else than a restart in place follows.

    Raises ConfigError if an attempt can't have the run folder.
    """
    folder, again, given = context.folder, False, allocation.nodes
    while True:
        context.host_guard.watch_from(allocation.nodes)
        attempt = JobAttempt(context, wait_for_disk(lambda: _claim(folder), "the next attempt", context.log), again)
        attempt.run(nodes)
        allocation = replace(allocation, nodes=_working(context, allocation.nodes, attempt.lost))
        may_restart = context.spec.in_place and not attempt.asked and not context.clock.is_near()
        life = read_lifecycle(folder)
        decision = decide(life, _policy(context, life), attempt.slurm_requeues(), allocation if may_restart else None)
        if decision.action != "restart":
            return decision
        nodes, again = decision.nodes, True
        unused = [node for node in given if node not in nodes]
        context.record(life.attempt, EventKind.JOB_RESTARTED, why=decision.why, nodes=list(nodes), unused=unused)
        context.log(f"restart in place: {decision.why}")


def _claim(folder: RunFolder) -> int:
    """The number of the next attempt, once the disk has room for its first files. Raises OSError and ConfigError."""
    check_room(folder.path)
    return claim_attempt(folder, patience_s=HOLDER_PATIENCE_S)


def _working(context: JobContext, nodes: tuple[str, ...], lost: Sequence[str]) -> tuple[str, ...]:
    """Those of `nodes` that neither the attempt nor Slurm has lost. A lost node stays out, even if it comes back."""
    gone = {*lost, *context.query_slurm(lambda: node_states.lost_nodes(nodes), [])}
    return tuple(node for node in nodes if node not in gone)


def _refusal(context: JobContext, life: RunLifecycle) -> str:
    """Why this job must not touch the run folder: another job trains in it or waits for it. Empty if there is none.

    The jobs of one submission, a job and its chain, never refuse each other. A job that is ending is waited for.
    """
    if context.job in life.jobs:
        return ""
    folder = context.folder
    jobs = life.jobs if life.phase != OVER else ()
    found = context.query_slurm(lambda: scheduler.find_jobs(jobs), {})
    others = [job for job in found.values() if job.live and job.state != "COMPLETING"]
    advice = f"wait for it, or end it: phalanx cancel {folder.path}"
    if others:
        return f"one job at a time trains in {folder.path}; job {others[0].number} is {others[0].state.lower()}: {advice}"
    deadline = time.monotonic() + HOLDER_PATIENCE_S
    while (holder := live_holder(folder)) is not None:
        if time.monotonic() > deadline:
            return f"one live attempt trains in a run folder; {folder.path} is held by {holder.describe()}: {advice}"
        time.sleep(1.0)
    return ""


def carry_out(context: JobContext, decision: NextAction) -> int:
    """Record a decision, then make Slurm carry it out. Returns the exit code of the batch step."""
    life = read_lifecycle(context.folder)
    context.log(f"{decision.state or decision.action}: {decision.why}")
    if decision.action == "over":
        return _finish(context, life, decision.state, decision.why, decision.exit_code)
    context.record(life.attempt, EventKind.JOB_REQUEUED, why=decision.why, exclude=list(decision.exclude))
    if decision.action == "wait":
        return decision.exit_code
    excluded = tuple(dict.fromkeys([*life.excluded, *decision.exclude]))
    later = _later_jobs(context, life)
    try:
        if not later:
            if failure := scheduler.requeue(context.job, excluded, REQUEUE_PATIENCE_S):
                context.log(f"the job is in the queue again, but {failure}")
        elif excluded:
            scheduler.exclude_nodes(later, excluded)
    except SchedulerError as error:
        return _resubmit(context, life, decision, excluded, str(error))
    return decision.exit_code


def _policy(context: JobContext, life: RunLifecycle) -> RequeuePolicy:
    """The run's policy. A chain with further jobs counts as requeue."""
    policy = context.spec.policy
    return replace(policy, requeue=policy.requeue or bool(_later_jobs(context, life)))


def _later_jobs(context: JobContext, life: RunLifecycle) -> tuple[int, ...]:
    """The jobs of the chain after this one."""
    return life.jobs[life.jobs.index(context.job) + 1 :] if context.job in life.jobs else ()


def _resubmit(context: JobContext, life: RunLifecycle, decision: NextAction, excluded: Sequence[str], refusal: str) -> int:
    """Submit the script again, because the site forbids requeue."""
    folder = context.folder
    if excluded:
        # sbatch --exclude replaces the list of the script, which has the user's own nodes.
        own = context.query_slurm(lambda: scheduler.details(context.job).excluded, ())
        excluded = tuple(dict.fromkeys([*own, *excluded]))
    try:
        job = scheduler.submit(context.job_dir / SCRIPT_NAME, f"afterany:{context.job}", excluded)
    except SchedulerError as error:
        why = f"{decision.why}; scontrol requeue: {refusal}; sbatch: {error}; phalanx resume {folder.path} goes on"
        return _finish(context, life, "preempted", why, decision.exit_code)
    context.record(life.attempt, EventKind.JOB_SUBMITTED, jobs=[*life.jobs, job], why=f"requeue was refused: {refusal}")
    return decision.exit_code


def _finish(context: JobContext, life: RunLifecycle, state: str, why: str, exit_code: int) -> int:
    context.record(life.attempt, EventKind.JOB_OVER, state=state, exit_code=exit_code, why=why)
    if later := _later_jobs(context, life):
        context.query_slurm(lambda: scheduler.cancel(later), None)
    return exit_code


def install_signal_queue(environ: Mapping[str, str]) -> list[int]:
    """Install the handlers first of all, because Slurm may signal at any time. Returns the list that receives the signals.

    A SIGUSR1 that came while the batch script ran modules and prologue is in the list already.
    """
    waiting = [int(signal.SIGUSR1)] if environ.get(EARLY_SIGNAL) else []
    for number in SIGNAL_REQUESTS:
        signal.signal(number, lambda received, _: waiting.append(received))
    return waiting


def main(argv: Sequence[str]) -> int:
    """Run the batch step. `argv` is JOB_DIR -- COMMAND, as in the batch script."""
    waiting = install_signal_queue(os.environ)
    guard_logs()
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm.batch_step",
        usage="%(prog)s JOB_DIR -- COMMAND …",
        description="The batch step of a Slurm job. COMMAND is srun and what it starts; {nodes}, {attempt_dir} and "
        "{log_dir} in it are replaced.",
    )
    parser.add_argument("job_dir", type=Path, metavar="JOB_DIR", help="launch/job_NNNN of the run folder")
    # argparse would also remove the -- inside the command.
    cut = list(argv).index("--") if "--" in argv else len(argv)
    found, command = parser.parse_args(list(argv[:cut])), argv[cut + 1 :]
    if not command:
        parser.error("a command must follow --")
    try:
        spec, environ = JobFile.read(found.job_dir), os.environ
    except FileNotFoundError as error:
        print(f"phalanx: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    job, restarts = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_RESTART_COUNT", 0))
    clock = TimeLimitClock(RunFolder(Path(spec.run_dir)), job, spec.stop_before_s, environ)
    guard = HostGuard(job, environ) if spec.in_place else HostGuard(job, {})
    standby = StandbyStep(command, environ, spec.standby_after_s)
    context = JobContext(found.job_dir, spec, job, restarts, command, environ, waiting, clock, guard, standby)
    try:
        return run(context)
    except (OSError, DiskError) as error:
        context.log(f"{spec.run_dir} can't be written: {error}; phalanx resume {spec.run_dir} goes on when it can")
        return EXIT_BROKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
