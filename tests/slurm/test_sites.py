"""What sites do to Slurm's commands: hidden partitions, drained nodes, banners, formats of time. Without a training run."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.slurm import node_states, scheduler
from tests.slurm.cluster import Cluster
from tests.slurm.world import NODES, WORDS, phalanx, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@contextmanager
def changed(*updates: tuple[list[str], list[str]]) -> Iterator[None]:
    """`scontrol update` before and after: (the change, its reverse)."""
    try:
        for change, _ in updates:
            subprocess.run(["scontrol", "update", *change], check=True)
        yield
    finally:
        for _, reverse in updates:
            subprocess.run(["scontrol", "update", *reverse], check=True)


def waiting_job(*options: str) -> int:
    command = ["sbatch", "--parsable", "--begin=now+1hour", "--output=/dev/null", *options, "--wrap=sleep 1"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_an_exclusion_joins_the_users_own_list(cluster: Cluster) -> None:
    job = waiting_job("--exclude=node[1-2]")
    scheduler.exclude_nodes([job], ["node4"])
    assert scheduler.details(job).excluded == ("node1", "node2", "node4")
    scheduler.exclude_nodes([job], ["node2", "node5"])
    assert scheduler.details(job).excluded == ("node1", "node2", "node4", "node5")
    other = waiting_job()
    assert scheduler.details(other).excluded == ()
    scheduler.exclude_nodes([other], ["node3"])
    assert scheduler.details(other).excluded == ("node3",)


def wrap_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a wrapper before each of Slurm's commands; {real} in `script` is the command."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "sinfo", "scontrol"):
        (folder / name).write_text(f"#!/bin/sh\n{script.replace('{real}', str(shutil.which(name)))}\n")
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_what_a_hidden_partition_hides_is_not_lost(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked as an ordinary user: root sees hidden partitions without --all. The capability opens the cluster's own folder."""
    partitions = ("main", "urgent")
    with changed(*(([f"partition={name}", "hidden=yes"], [f"partition={name}", "hidden=no"]) for name in partitions)):
        job = waiting_job()
        user = "--reuid=65534 --inh-caps=+dac_override --ambient-caps=+dac_override"
        with monkeypatch.context() as as_user:
            wrap_commands(tmp_path / "bin", as_user, f'exec setpriv {user} {{real}} "$@"')
            shown = subprocess.run(["sinfo", "--noheader", "--Node"], check=True, capture_output=True, text=True).stdout
            assert shown.strip() == "", "sinfo without --all shows nothing"
            assert node_states.lost_nodes(cluster.nodes) == []
            assert node_states.node_addresses(["node2"]) == {"node2": "127.0.1.2"}
            assert scheduler.find_jobs([job])[job].state == "PENDING"
            assert node_states.lost_nodes(["of-another-cluster"]) == [], "unknown is not lost"


def test_a_draining_node_is_not_lost(cluster: Cluster) -> None:
    job = subprocess.run(
        ["sbatch", "--parsable", "--nodelist=node1", "--output=/dev/null", "--wrap=sleep 60"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    cluster.wait_for(lambda: scheduler.find_jobs([int(job)])[int(job)].state == "RUNNING", "the job's start", 90)
    drain = ["nodename=node[1-2]", "state=drain", "reason=test"]
    with changed((drain, ["nodename=node[1-2]", "state=resume"])):
        states = subprocess.run(["sinfo", "-h", "-N", "-n", "node[1-2]", "-o", "%T"], check=True, capture_output=True, text=True)
        assert {"draining", "drained"} <= set(states.stdout.split())
        assert node_states.lost_nodes(["node1", "node2"]) == []


@pytest.mark.prove
def test_a_node_without_power_is_lost(cluster: Cluster) -> None:
    """A run that loses nodes: test_restart.py, every day."""
    cluster.power_off("node3")
    cluster.wait_for(lambda: node_states.lost_nodes(cluster.nodes) == ["node3"], "node3 to be lost", 120)


def test_banners_and_formats_do_not_change_what_is_read(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site wraps Slurm's commands to print its news; a user sets formats for the eye."""
    news = 'echo "*** Maintenance on Monday 12 ***"'
    wrap_commands(tmp_path / "bin", monkeypatch, f'{news}\n{{real}} "$@"\ncode=$?\necho "Have fun | 1"\nexit $code')
    for name, value in (("SQUEUE_FORMAT", "%i"), ("SINFO_FORMAT", "%n"), ("SLURM_TIME_FORMAT", "relative")):
        monkeypatch.setenv(name, value)
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --time=30 --nodelist=node1 --output=/dev/null\nsleep 30\n")
    job = scheduler.submit(script)
    cluster.wait_for(lambda: scheduler.find_jobs([job])[job].state == "RUNNING", "the job's start", 90)
    assert scheduler.find_jobs([job])[job].nodes == "node1"
    assert node_states.lost_nodes(["node1"]) == [] and scheduler.expand("node[1-2]") == ["node1", "node2"]
    assert abs(scheduler.details(job).limit_s - time.time() - 1800) < 30, "relative times would give no limit at all"


def test_an_answer_without_a_job_id_says_that_a_job_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'Your job has been queued.'\n")
    sbatch.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(scheduler.SchedulerError, match=r"no job id: 'Your job has been queued\.'.*squeue --me"):
        scheduler.submit(tmp_path / "job.sh")


def test_a_run_waits_for_drained_nodes_in_the_queue(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    """sbatch takes it, and sbatch --test-only does not. A number of nodes that the cluster lacks stays refused."""
    drain = ["nodename=node[1-4]", "state=drain", "reason=test"]
    with changed((drain, ["nodename=node[1-4]", "state=resume"])):
        run = submit(cluster, run_config, tmp_path / "run")
        status = phalanx("status", str(tmp_path / "run")).stdout
        assert "queued" in status, status
        again = phalanx("launch", str(run_config), f"run.dir={tmp_path / 'run'}", *NODES, *WORDS)
        assert again.returncode == 2 and f"job {run.job} is pending" in again.stderr
        assert phalanx("cancel", str(tmp_path / "run")).returncode == 0


def test_two_submissions_at_once_leave_one_job(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    words = [str(run_config), f"run.dir={tmp_path / 'run'}", *NODES, *WORDS, "launch.slurm.extra=[--begin=now+1hour]"]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: phalanx("launch", *words), range(3)))
    assert sorted(command.returncode for command in done) == [0, 2, 2], [command.stderr for command in done]
    refused = [command.stderr for command in done if command.returncode]
    assert all("one job at a time trains in a run folder" in text and "Traceback" not in text for text in refused), refused
