"""Requeues: many by a job itself, and those of an administrator. The first need no training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm import scheduler
from pretrain.run.beat import COMPUTING, SAVING
from tests.run.world import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.test_survival import check_one_run
from tests.slurm.world import Run, act, kill_a_rank, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

JOBS, REQUEUES = 6, 5
# A job that requeues itself as the batch step does, and writes down what each requeue said.
PROGRAM = """
import json, os, sys
from launch.slurm import scheduler
from launch.slurm.batch_step import install_signal_queue
install_signal_queue({})
job, restarts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
said = None
if restarts < int(sys.argv[2]):
    try:
        said = scheduler.requeue(job, [f"node{restarts % 2 + 4}"], 60.0)
    except scheduler.SchedulerError as error:
        said = f"refused: {error}"
with open(sys.argv[1], "a") as file:
    print(json.dumps([restarts, said]), file=file)
"""


@pytest.mark.prove
def test_no_job_is_left_held_by_its_own_requeues(cluster: Cluster, tmp_path: Path) -> None:
    """Thirty requeues with an exclusion. Slurm signals each job while the commands run that finish the requeue."""
    (tmp_path / "program.py").write_text(PROGRAM)
    jobs = {}
    for number in range(JOBS):
        script, said = tmp_path / f"job{number}.sh", tmp_path / f"said{number}"
        command = f"PYTHONPATH={ROOT} exec {sys.executable} {tmp_path}/program.py {said} {REQUEUES}"
        script.write_text(
            f"#!/bin/bash\n#SBATCH --requeue --exclude=node3 --output={tmp_path}/%j.out --open-mode=append\n{command}\n"
        )
        jobs[scheduler.submit(script)] = said
    cluster.wait_for(lambda: not any(job.live for job in scheduler.find_jobs(list(jobs)).values()), "the end of all jobs", 400)
    for job, said in jobs.items():
        rows = [json.loads(line) for line in said.read_text().splitlines()]
        assert rows == [*([number, ""] for number in range(REQUEUES)), [REQUEUES, None]], (tmp_path / f"{job}.out").read_text()
        assert scheduler.find_jobs([job])[job].state == "COMPLETED"
        assert scheduler.details(job).excluded == ("node3", "node4", "node5"), "the user's own node too"


def requeue_by_administrator(run: Run) -> str:
    subprocess.run(["scontrol", "requeue", str(run.job)], check=True)
    return "preempted"


@pytest.mark.prove
def test_an_administrator_requeues_a_run(cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path) -> None:
    """In a step, in a save, and after the end. The run loses nothing, and a finished run stays finished."""
    run = submit(cluster, run_config, tmp_path / "run")
    act(run, requeue_by_administrator, phase=COMPUTING)
    act(run, requeue_by_administrator, phase=SAVING)
    check_one_run(run, quiet, ["preempted", "preempted"])
    cluster.wait_for(lambda: not scheduler.find_jobs([run.job])[run.job].live, "the job's end", 60)
    overs = len(run.events("job_over"))
    before = (run.folder.metrics.read_bytes(), run.events("attempt"))
    subprocess.run(["scontrol", "requeue", str(run.job)], check=True)
    cluster.wait_for(lambda: len(run.events("job_over")) > overs, "the end of the requeued job", 90)
    assert run.life.state == "finished" and (run.folder.metrics.read_bytes(), run.events("attempt")) == before, run.story()


def cancel_and_kill_a_rank(run: Run) -> str:
    """As `phalanx cancel` asks; a rank dies before it has saved, and rank 0 fails because it has lost it."""
    subprocess.run(["scancel", "--signal=INT", "--batch", str(run.job)], check=True)
    run.wait(lambda: bool(run.events("job_signal")), "the request")
    return kill_a_rank(run) and "stopped"


@pytest.mark.prove
def test_a_run_that_its_user_ends_does_not_come_back(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    run = submit(cluster, run_config, tmp_path / "run")
    act(run, cancel_and_kill_a_rank, phase=COMPUTING)
    assert run.wait_over().state == "stopped" and not run.events("job_requeued"), run.story()
