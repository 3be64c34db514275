"""Runs on sites that leak environment, take ports and start a script twice: each trains as if it had not happened."""

from __future__ import annotations

import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from launch.slurm.rendezvous import PORT_BASE
from launch.slurm.scheduler import find_jobs
from tests.slurm.cluster import Cluster
from tests.slurm.world import NODES, STEPS, WORDS, phalanx, submit

pytestmark = [pytest.mark.slurm, pytest.mark.prove, pytest.mark.timeout(600)]


def test_launched_inside_an_allocation_of_another_kind(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    """The allocation has memory by core, the run asks for memory by node: srun refuses to get both."""
    words = ["launch.slurm.mem=1500", "launch.slurm.extra=[]"]
    leaked = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100"}
    dry = phalanx(
        "launch", str(run_config), f"run.dir={tmp_path / 'run'}", *NODES, *WORDS, *words, "--dry-run", timeout_s=120, **leaked
    )
    assert "2 variables of Slurm job 7" in dry.stderr and dry.stdout.startswith("#!/bin/bash")
    run = submit(cluster, run_config, tmp_path / "run", *words, **leaked)
    assert run.wait_over().state == "finished" and len(run.life.ends) == 1, run.story()


def test_the_script_is_submitted_by_hand_inside_an_allocation(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    words = ["launch.slurm.mem=1500", "launch.slurm.extra=[--begin=now+1hour]"]
    run = submit(cluster, run_config, tmp_path / "run", *words)
    subprocess.run(["scancel", str(run.job)], check=True)
    script = tmp_path / "run" / "launch" / "job_0001" / "batch.sh"
    script.write_text(script.read_text().replace("#SBATCH --begin=now+1hour\n", ""))
    command = ["salloc", "--nodes=1", "--mem-per-cpu=100", "--nodelist=node5", "srun", "sbatch", str(script)]
    subprocess.run(command, check=True, capture_output=True)
    assert run.wait_over().state == "finished" and len(run.life.ends) == 1, run.story()


def test_ranks_get_their_environment_without_the_submitters(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    run = submit(cluster, run_config, tmp_path / "run", "launch.env={MARKER: config}", SBATCH_EXPORT="NONE")
    run.wait_to_train()
    assert run.ranks()[0].environ()["MARKER"] == "config"
    assert run.wait_over().state == "finished" and len(run.life.ends) == 1, run.story()


def test_taken_ports_are_passed_over(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    taken = [socket.socket() for _ in range(40)]
    try:
        for port, listener in enumerate(taken, PORT_BASE):
            # A port of a connection that has just ended counts as free for the run, so it must be taken as well.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Another process's listener is as good as ours.
            with suppress(OSError):
                listener.bind(("127.0.1.1", port))
                listener.listen()
        run = submit(cluster, run_config, tmp_path / "run")
        assert run.job < 40, "the job's own port is one of the taken ones"
        assert run.wait_over().state == "finished" and len(run.life.ends) == 1, run.story()
    finally:
        for listener in taken:
            listener.close()
    said = (tmp_path / "run" / "logs" / f"slurm-{run.job}.out").read_text()
    assert int(said.partition("agents meet at node1:")[2].split()[0]) >= PORT_BASE + 40


def test_a_fixed_port_that_is_taken_is_named(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.1.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        run = submit(cluster, run_config, tmp_path / "run", f"launch.master_port={port}", "launch.slurm.max_without_progress=1")
        life = run.wait_over()
    assert life.state == "gave_up" and f"port {port} on" in life.why, run.story()


def test_a_second_job_beside_a_living_run_changes_nothing(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    run = submit(cluster, run_config, tmp_path / "run")
    run.wait_to_train()
    script = str(tmp_path / "run" / "launch" / "job_0001" / "batch.sh")
    done = subprocess.run(["sbatch", "--parsable", script], check=True, capture_output=True, text=True).stdout
    second = int(done)
    cluster.wait_for(lambda: not find_jobs([second])[second].live, "the second job's end", 60)
    assert run.life.jobs == (run.job,) and run.job != second, run.story()
    assert f"job {run.job} is running: wait for it" in (tmp_path / "run" / "logs" / f"slurm-{second}.out").read_text()
    assert run.wait_over().state == "finished" and run.steps() == STEPS, run.story()
