"""The user's commands against a real queue: submit, look, cancel, resume, refuse."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.slurm.lifecycle import OVER
from launch.slurm.scheduler import find_jobs
from pretrain.run.beat import COMPUTING, READING
from pretrain.run.folder import EXIT_CODE, RunFolder
from tests.run.world import check_equal
from tests.slurm.cluster import Cluster
from tests.slurm.world import NODES, STEPS, WORDS, Run, phalanx, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_a_queued_run_says_why_it_waits_and_is_cancelled(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    run = submit(cluster, run_config, tmp_path / "run", "launch.slurm.extra=[--begin=now+1hour]")
    status = json.loads(phalanx("status", str(tmp_path / "run"), "--json").stdout)
    assert status["state"] == "queued" and "BeginTime" in status["why"] and status["job"]["number"] == run.job
    second = phalanx("launch", str(run_config), f"run.dir={tmp_path / 'run'}", *NODES, *WORDS)
    assert second.returncode == 2 and f"job {run.job} is pending" in second.stderr and "phalanx cancel" in second.stderr
    assert phalanx("cancel", str(tmp_path / "run")).returncode == 0
    assert (run.life.phase, run.life.state) == (OVER, "stopped")
    assert find_jobs([run.job])[run.job].state == "CANCELLED"
    text = phalanx("status", str(tmp_path / "run")).stdout
    assert "stopped: cancelled while it waited" in text
    assert "nothing to cancel" in phalanx("cancel", str(tmp_path / "run")).stdout


def test_signals_and_cancel_reach_a_run_that_still_runs_its_prologue(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    """A preemption's SIGUSR1 is kept for the batch step. `phalanx cancel` ends the job at once: nothing is there to save."""
    prologue = f"until [ -e {tmp_path}/go ]; do touch {tmp_path}/waits; sleep 0.1; done"
    run = submit(cluster, run_config, tmp_path / "run", f"launch.slurm.prologue=[{json.dumps(prologue)}]")
    cluster.wait_for((tmp_path / "waits").exists, "the prologue", 120)
    subprocess.run(["scancel", "--signal=USR1", "--batch", str(run.job)], check=True)
    (tmp_path / "go").touch()
    run.wait(lambda: bool(run.life.ends), "the attempt's end")
    assert (run.life.ends[0].cause, run.life.ends[0].why) == ("preempted", "preempted before the first step"), run.story()
    (tmp_path / "go").unlink()
    (tmp_path / "waits").unlink()
    cluster.wait_for((tmp_path / "waits").exists, "the prologue of the requeued job", 120)
    cancelled = phalanx("cancel", str(tmp_path / "run"))
    assert cancelled.returncode == 0 and "was cancelled before its batch step began" in cancelled.stdout, cancelled
    assert (run.life.phase, run.life.state) == (OVER, "stopped")
    assert find_jobs([run.job])[run.job].state == "CANCELLED"


def test_a_chain_is_submitted_and_cancelled_as_one(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    run = submit(cluster, run_config, tmp_path / "run", "launch.slurm.chain=2", "launch.slurm.extra=[--begin=now+1hour]")
    assert len(run.life.jobs) == 3
    waits = subprocess.run(
        ["squeue", "-h", "-j", str(run.life.jobs[1]), "-o", "%E"], check=True, capture_output=True, text=True
    ).stdout
    assert f"afterany:{run.job}" in waits
    phalanx("cancel", str(tmp_path / "run"))
    assert {job.state for job in find_jobs(run.life.jobs).values()} == {"CANCELLED"}


def test_a_ladder_holds_its_limit_and_goes_on_with_what_is_missing(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    """Three points, one at a time: the second job waits for the first. Another launch starts only the cancelled point again."""
    path = tmp_path / "ladder.yaml"
    path.write_text(
        f"ladder: {{base: {run_config}, dir: {tmp_path / 'runs'}, max_running: 1, grid: {{optimizer.lr: [1e-3, 2e-3, 3e-3]}}}}"
    )
    words = [*NODES, *WORDS, "launch.slurm.extra=[--begin=now+1hour]"]
    launched = phalanx("launch", str(path), "--yes", *words)
    assert launched.returncode == 0 and "3 points" in launched.stdout, launched.stderr
    runs = json.loads(phalanx("status", str(path), "--json").stdout)["runs"]
    jobs = [run["job"]["number"] for run in runs]
    assert [run["state"] for run in runs] == ["queued"] * 3
    waits = [subprocess.run(["squeue", "-h", "-j", str(job), "-o", "%E"], check=True, capture_output=True, text=True).stdout
             for job in jobs]  # fmt: skip
    assert f"afterany:{jobs[0]}" in waits[1] and f"afterany:{jobs[1]}" in waits[2] and "afterany" not in waits[0]
    assert phalanx("cancel", runs[1]["run_dir"]).returncode == 0
    again = phalanx("launch", str(path), "--yes", *words)
    assert "1 points" in again.stdout and "lr2e-3: job" in again.stdout, again.stdout + again.stderr
    document = json.loads(phalanx("status", str(tmp_path / "runs"), "--json").stdout)
    assert document["states"] == {"queued": 3} and document["runs"][1]["job"]["number"] not in jobs
    for run in document["runs"]:
        phalanx("cancel", run["run_dir"])


def test_what_slurm_refuses_is_one_report(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path / 'run'}", *NODES, *WORDS]
    refused = phalanx("launch", str(run_config), *words, "launch.slurm.partition=nowhere")
    assert refused.returncode == 2 and "invalid partition" in refused.stderr.lower() and "Traceback" not in refused.stderr
    assert not (tmp_path / "run" / "events.jsonl").exists()
    too_many = phalanx("launch", str(run_config), *words, "launch.nodes=6", "batch.global_batch_seqs=48", "parallel.pipeline=1")
    assert too_many.returncode == 2 and "Slurm must take the job" in too_many.stderr


# Keys of launch.slurm that become options of sbatch. All are written alike.
OPTIONS = ("partition", "nodelist", "dependency", "gres", "account", "qos", "constraint", "gpus_per_node", "mem", "exclude",
           "reservation")  # fmt: skip


@pytest.mark.parametrize("options", [OPTIONS[:3], pytest.param(OPTIONS[3:], marks=pytest.mark.prove)], ids=["some", "others"])
def test_hostile_strings_are_harmless(cluster: Cluster, run_config: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Through a real sbatch: what it takes, it takes as text."""
    payload = f"\"; touch {tmp_path}/canary; $(touch {tmp_path}/canary) ' #"
    words = [json.dumps({"A": payload}), json.dumps([payload])]
    run = submit(
        cluster, run_config, tmp_path / "run", f"launch.env={words[0]}", f"launch.slurm.srun_args={words[1]}",
        f"launch.slurm.extra={json.dumps(['--exclusive', '--comment=' + shlex.quote(payload)])}", "launch.slurm.requeue=false",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while find_jobs([run.job])[run.job].live and run.life.phase != OVER and time.monotonic() < deadline:
        time.sleep(0.2)
    for name in options:
        other = [f"run.dir={tmp_path / name}", *NODES, *WORDS, f"launch.slurm.{name}={json.dumps(payload)}"]
        done = phalanx("launch", str(run_config), *other)
        # sbatch takes any account where nobody keeps accounts, and any list of nodes to keep off.
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, f"{name}: {done.stderr}"
    subprocess.run(["scancel", "--user=root"], check=True)
    assert not (tmp_path / "canary").exists()


def test_bad_data_ends_the_job_with_its_report(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    """Told before the queue. With --no-data only a compute node finds it: no restart, exit 2, the report in logs and status."""
    words = ("data.train=[{path: nowhere, weight: 1}]",)
    refused = phalanx("launch", str(run_config), f"run.dir={tmp_path / 'run'}", *NODES, *WORDS, *words)
    assert refused.returncode == 2 and "nowhere.idx" in refused.stderr and not (tmp_path / "run").exists()
    run = submit(cluster, run_config, tmp_path / "run", *words, "--no-data")
    life = run.wait_over()
    assert life.state == "bad_input" and len(life.ends) == 1, run.story()
    assert "nowhere" in phalanx("status", str(tmp_path / "run")).stdout
    assert "nowhere" in phalanx("logs", str(tmp_path / "run")).stdout
    cluster.wait_for(lambda: not find_jobs([run.job])[run.job].live, "the job's end", 90)
    code = subprocess.run(["scontrol", "show", "job", "-o", str(run.job)], check=True, capture_output=True, text=True).stdout
    assert "ExitCode=2:0" in code


def test_cancel_saves_and_resume_goes_on(cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path) -> None:
    """While the data is opened: a user's stop, which phalanx resume goes on from."""
    run = submit(cluster, run_config, tmp_path / "run")
    with ThreadPoolExecutor() as pool:
        with run.held_at(READING):
            waiting = pool.submit(phalanx, "cancel", str(tmp_path / "run"))
        cancelled = waiting.result()
    assert cancelled.returncode == 0 and "stopped: phalanx cancel after step" in cancelled.stdout, cancelled
    outcome = RunFolder(tmp_path / "run").read_outcome()
    assert outcome is not None and outcome.state == "stopped" and EXIT_CODE["stopped"] == 130
    resume_to_the_end(run, quiet)
    again = phalanx("resume", str(tmp_path / "run"))
    assert again.returncode == 0 and "is finished" in again.stdout


@pytest.mark.prove
def test_a_scancel_by_hand_is_a_users_stop(cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path) -> None:
    run = submit(cluster, run_config, tmp_path / "run")
    with run.held_at(COMPUTING):
        subprocess.run(["scancel", str(run.job)], check=True)
    life = run.wait_over()
    assert life.state == "stopped" and "scancel" in life.why, run.story()
    resume_to_the_end(run, quiet)


def resume_to_the_end(run: Run, quiet: Path) -> None:
    resumed = phalanx("resume", str(run.folder.path))
    assert resumed.returncode == 0, resumed.stderr
    assert run.wait_over().state == "finished", run.story()
    check_equal(run.folder.path, quiet, STEPS)
