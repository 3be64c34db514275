"""The check-up of an allocation as a short Slurm job. In: a config and a request. Out: the script, and how the job ended.

The job requests the same resources as the training job with a shorter time limit. It therefore waits in the same queue
for the same nodes.

Torch-free.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from configs.errors import ConfigError, Problem
from configs.schema import Config
from configs.units import duration
from launch.doctor.local import probe_arguments, probe_path
from launch.doctor.request import FINISHED, HOSTNAMES, NETWORK_LOG, NODES_LOG, CheckupRequest
from launch.doctor.results import read_hostnames
from launch.slurm import node_states, scheduler
from launch.slurm.job_file import SCRIPT_NAME
from launch.slurm.scheduler import SchedulerError, SlurmJob
from launch.slurm.script import ScriptLocation, common_words, fill, option_lines, output_pattern, placement
from pretrain.run.files import storage_problem, write_atomically

# Long enough for the first import of torch over a network file system, and for the slowest networks.
LOOK_S, WAIT_S, NETWORK_S, JOB_MINUTES = 180, 90, 300, 10
POLL_S, SAY_S = 1.0, 30.0
# A network file system may show a job's last files this much later.
SEEN_WITHIN_S = 10.0
OUTPUT = "slurm.out"


@dataclass(frozen=True)
class CheckupJobEnd:
    """`error` says why the job delivered no results or incomplete ones. It is empty if the job ran to its end."""

    job: SlurmJob
    error: str


def render(config: Config, request: CheckupRequest, place: ScriptLocation) -> str:
    """The batch script; `place.job_dir` is the check-up's folder."""
    folder = place.job_dir
    options = {
        "job-name": f"{config.run.name}-doctor",
        **placement(config),
        "time": JOB_MINUTES,
        "output": output_pattern(folder / OUTPUT),
    }
    return fill(
        "doctor.sh.j2",
        **common_words(config, place),
        script=shlex.quote(str(folder / SCRIPT_NAME)),
        # One lost node must not end the job, which would lose the results of the other nodes.
        sbatch=[*option_lines(options), "--no-requeue", "--no-kill", *config.launch.slurm.extra],
        folder=str(folder),
        request=request.to_json(),
        look_s=LOOK_S,
        wait_s=WAIT_S,
        network_s=NETWORK_S,
        hostnames=HOSTNAMES,
        nodes_log=NODES_LOG,
        network_log=NETWORK_LOG,
        finished=FINISHED,
        program=probe_path(),
        arguments=shlex.join(probe_arguments(request)),
    )


def submit(config: Config, request: CheckupRequest, place: ScriptLocation) -> int:
    """Write the script and submit it. Returns the job id. Raises ConfigError if the disk or Slurm refuses."""
    script = place.job_dir / SCRIPT_NAME
    try:
        write_atomically(script, render(config, request, place))
    except OSError as error:
        raise ConfigError(storage_problem("run.dir", place.job_dir, error)) from error
    try:
        # Not tested by sbatch --test-only first: that also refuses a job that only has to wait for a drained node.
        return scheduler.submit(script)
    except SchedulerError as error:
        fix = "correct launch.slurm to what this cluster has (sinfo, sacctmgr show assoc), or see --dry-run for the script"
        got = config.launch.slurm.partition
        raise ConfigError(Problem("launch.slurm", got, f"Slurm must take the job: {error}", fix)) from error


def wait(number: int, folder: Path, timeout_s: float, partition: str | None, err: TextIO) -> CheckupJobEnd:
    """Wait until the job has ended. After `timeout_s` seconds, or at an interrupt, the job is cancelled."""
    begin_s, said, said_s = time.monotonic(), "", 0.0
    job = SlurmJob(number, "PENDING")
    try:
        while job.live and (passed_s := time.monotonic() - begin_s) < timeout_s:
            text = _progress(job)
            if text != said or passed_s >= said_s + SAY_S:
                said, said_s = text, passed_s
                print(f"{duration(passed_s)}  {text}", file=err, flush=True)
            time.sleep(POLL_S)
            job = _look(job)
    except BaseException:
        _cancel(number, err)
        raise
    if job.live:
        _cancel(number, err)
        return CheckupJobEnd(job, _too_late(job, timeout_s, partition))
    _wait_for_files(folder, job)
    return CheckupJobEnd(job, _why_incomplete(job, folder))


def _cancel(number: int, err: TextIO) -> None:
    try:
        scheduler.cancel([number])
    except SchedulerError as error:
        print(f"job {number} is still there: {error}; scancel {number} ends it", file=err, flush=True)


def _look(before: SlurmJob) -> SlurmJob:
    """The job's current state, or `before` while the controller does not answer. A job that Slurm has forgotten has ended."""
    try:
        return scheduler.find_jobs([before.number]).get(before.number, SlurmJob(before.number, "ENDED"))
    except SchedulerError:
        return before


def _progress(job: SlurmJob) -> str:
    why = f" ({job.reason})" if job.reason and job.state == "PENDING" else ""
    where = f" on {job.nodes}" if job.nodes else ""
    return f"job {job.number}: {job.state.lower()}{why}{where}"


def _too_late(job: SlurmJob, timeout_s: float, partition: str | None) -> str:
    lost = "; ".join(_unavailable(partition))
    return f"{_progress(job)} for {duration(timeout_s)}, and was cancelled; --timeout S waits longer" + (
        f"\n      not available: {lost}" if lost else ""
    )


def _unavailable(partition: str | None) -> list[str]:
    """Nodes that Slurm lists as down or drained, with its reason, for example `node3 down* (Not responding)`."""
    # sinfo refuses both options at once.
    where = f"--partition={partition}" if partition else "--all"
    try:
        rows = scheduler.call(["sinfo", where, "--noheader", "--Node", "--format=%N|%T|%E"]).splitlines()
    except SchedulerError as error:
        return [f"sinfo does not answer: {error}"]
    cells = dict.fromkeys(tuple(row.split("|", 2)) for row in rows)
    lost = [cell for cell in cells if len(cell) == 3 and any(word in cell[1].lower() for word in node_states.NODE_UNAVAILABLE)]
    return [f"{node} {state} ({reason})" if reason != "none" else f"{node} {state}" for node, state, reason in lost]


def _wait_for_files(folder: Path, job: SlurmJob) -> None:
    deadline = time.monotonic() + (SEEN_WITHIN_S if job.state in ("COMPLETED", "ENDED") else 0.0)
    while not (folder / FINISHED).exists() and time.monotonic() < deadline:
        time.sleep(0.2)


def _why_incomplete(job: SlurmJob, folder: Path) -> str:
    if (folder / FINISHED).exists():
        return ""
    said = _tail(folder / OUTPUT)
    how = "did not begin" if not read_hostnames(folder) else "did not come to its end"
    return (
        f"job {job.number} {how}: {job.state}" + (f" ({job.reason})" if job.reason else "") + (f"\n      {said}" if said else "")
    )


def _tail(file: Path) -> str:
    lines: Sequence[str] = file.read_text(errors="replace").strip().splitlines() if file.exists() else ()
    return "\n      ".join(lines[-5:])
