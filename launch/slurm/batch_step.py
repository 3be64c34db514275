"""The batch step of a Slurm job: python -m launch.slurm.batch_step JOB_DIR -- srun …

Claims an attempt, runs it (launch/slurm/attempt.py), and decides at its end: over, requeue, or left to Slurm. All that it
knows of earlier attempts stands in events.jsonl, so that it may be killed at any moment and started on other nodes.
Standard library and this project's light modules only.

Torch-free.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.errors import ConfigError
from launch.local.run import claim_attempt
from launch.slurm import scheduler
from launch.slurm.attempt import ASKS, JobAttempt, JobContext
from launch.slurm.clock import Clock
from launch.slurm.job_file import SCRIPT_NAME, JobFile
from launch.slurm.lifecycle import ENDED, OVER, Decision, Life, Policy, decide, read_life
from launch.slurm.scheduler import SchedulerError
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.folder import SILENCE_S, RunFolder

# A controller that is restarted comes back within minutes; longer waits would hold the nodes for nothing.
REQUEUE_PATIENCE_S = 600.0


def run(context: JobContext) -> int:
    """The whole batch step; returns its exit code."""
    folder, spec = context.folder, context.spec
    life = read_life(folder)
    if context.job not in life.jobs or life.phase == OVER:
        # By hand, or put back by somebody after it was over.
        append_event(folder, life.attempt, EventKind.JOB_SUBMITTED, jobs=[context.job])
    done = folder.done_step()
    if done is not None and done >= spec.stop_step:
        return act(context, Decision("over", f"finished at step {done}", "finished"))
    life = read_life(folder)
    if life.lost:
        JobAttempt(context, life.lost).post_mortem(life)
        life = read_life(folder)
    if life.phase == ENDED:
        # The attempt before had no time to decide, or left it to Slurm.
        decision = decide(life, spec.policy, slurm_requeues=True)
        if decision.action != "wait":
            return act(context, decision)
        append_event(folder, life.attempt, EventKind.JOB_REQUEUED, why=decision.why, exclude=[])
    nodes = scheduler.expand(context.environ["SLURM_JOB_NODELIST"])
    size = max((size for size in spec.sizes if size <= len(nodes)), default=None)
    if size is None:
        why = f"Slurm gave {len(nodes)} nodes; layout and batch need one of {', '.join(map(str, spec.sizes))}"
        return act(context, Decision("over", why, "bad_input"))
    try:
        # The lock of a rank 0 that died with its node falls silent before it may be taken.
        attempt = JobAttempt(context, claim_attempt(folder, patience_s=2 * SILENCE_S))
    except ConfigError as error:
        return act(context, Decision("over", str(error), "gave_up"))
    attempt.run(nodes[:size])
    life = read_life(folder)
    return act(context, decide(life, _policy(context, life), attempt.slurm_requeues()))


def act(context: JobContext, decision: Decision) -> int:
    """Record a decision, then have Slurm do it; returns the batch step's exit code."""
    folder, life = context.folder, read_life(context.folder)
    context.say(f"{decision.state or decision.action}: {decision.why}")
    if decision.action == "over":
        return _over(context, life, decision.state, decision.why, decision.exit_code)
    append_event(folder, life.attempt, EventKind.JOB_REQUEUED, why=decision.why, exclude=list(decision.exclude))
    if decision.action == "wait":
        return decision.exit_code
    excluded = tuple(dict.fromkeys([*life.excluded, *decision.exclude]))
    later = _later_jobs(context, life)
    try:
        if not later:
            scheduler.requeue(context.job, excluded, REQUEUE_PATIENCE_S)
        elif excluded:
            scheduler.keep_off(later, excluded)
    except SchedulerError as error:
        return _submit_anew(context, life, decision, str(error))
    return decision.exit_code


def _policy(context: JobContext, life: Life) -> Policy:
    """Without requeue a chain goes on as long as it has further jobs."""
    policy = context.spec.policy
    return replace(policy, requeue=policy.requeue or bool(_later_jobs(context, life)))


def _later_jobs(context: JobContext, life: Life) -> tuple[int, ...]:
    """The chain behind this job."""
    return life.jobs[life.jobs.index(context.job) + 1 :] if context.job in life.jobs else ()


def _submit_anew(context: JobContext, life: Life, decision: Decision, refusal: str) -> int:
    """A site that forbids requeue may still take the script again."""
    folder = context.folder
    try:
        job = scheduler.submit(context.job_dir / SCRIPT_NAME, f"afterany:{context.job}")
    except SchedulerError as error:
        why = f"{decision.why}; scontrol requeue: {refusal}; sbatch: {error}; phalanx resume {folder.path} goes on"
        return _over(context, life, "preempted", why, decision.exit_code)
    append_event(folder, life.attempt, EventKind.JOB_SUBMITTED, jobs=[*life.jobs, job], why=f"requeue was refused: {refusal}")
    return decision.exit_code


def _over(context: JobContext, life: Life, state: str, why: str, exit_code: int) -> int:
    append_event(context.folder, life.attempt, EventKind.JOB_OVER, state=state, exit_code=exit_code, why=why)
    if later := _later_jobs(context, life):
        context.ask_slurm(lambda: scheduler.cancel(later), None)
    return exit_code


def listen() -> list[int]:
    """Take the signals before anything else is done, for Slurm doesn't wait; the list grows as they come."""
    waiting: list[int] = []
    for number in ASKS:
        signal.signal(number, lambda received, _: waiting.append(received))
    return waiting


def main(argv: Sequence[str]) -> int:
    """JOB_DIR -- COMMAND: as the batch script writes it."""
    waiting = listen()
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm.batch_step",
        usage="%(prog)s JOB_DIR -- COMMAND …",
        description="The batch step of a Slurm job. COMMAND is srun and what it starts; in it {nodes}, {attempt_dir} and "
        "{log_dir} are filled in.",
    )
    parser.add_argument("job_dir", type=Path, metavar="JOB_DIR", help="launch/job_NNNN of the run folder")
    # argparse would take the command's own -- away as well.
    cut = list(argv).index("--") if "--" in argv else len(argv)
    found, command = parser.parse_args(list(argv[:cut])), argv[cut + 1 :]
    if not command:
        parser.error("a command must follow --")
    spec, environ = JobFile.read(found.job_dir), os.environ
    job, restarts = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_RESTART_COUNT", 0))
    clock = Clock(RunFolder(Path(spec.run_dir)), job, spec.stop_before_s, environ)
    return run(JobContext(found.job_dir, spec, job, restarts, command, environ, waiting, clock))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
