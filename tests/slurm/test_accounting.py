"""Accounting: jobs that squeue has forgotten are found by sacct, behind a real slurmdbd and MariaDB of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm import scheduler
from launch.slurm.scheduler import SlurmJob
from tests.slurm.cluster import Cluster, missing, started
from tests.slurm.world import phalanx, submit

pytestmark = [pytest.mark.slurm, pytest.mark.prove, pytest.mark.timeout(600)]

PROGRAMS = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacct", "sacctmgr")
# MinJobAge: squeue forgets a job that has ended this many seconds before.
SETTINGS = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStorageUser=root
AccountingStoragePass={{folder}}/run/munge.sock
MinJobAge=2
"""
_DBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost=localhost
DbdPort={port}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


class AccountedCluster(Cluster):
    """A cluster whose controller reports to a slurmdbd. The database listens on a socket in the cluster's folder alone."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, 2, SETTINGS.format(port=port))
        self._dbd_port = port

    def start_controller(self) -> None:
        data, socket = self.folder / "db", self.folder / "run" / "db.sock"
        command = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
        subprocess.run(command, check=True, capture_output=True)
        self._spawn(
            "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={socket}", "--skip-networking"
        )
        self.wait_for(socket.exists, "the database's socket", 30)
        # libmariadb's name for the socket of localhost.
        os.environ["MYSQL_UNIX_PORT"] = str(socket)
        config = self.folder / "slurmdbd.conf"
        config.touch(mode=0o600)
        config.write_text(_DBD.format(folder=self.folder, port=self._dbd_port))
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self.wait_for(lambda: self._run("sacctmgr", "-n", "show", "cluster").returncode == 0, "slurmdbd to answer", 60)
        self._call("sacctmgr", "-i", "add", "cluster", "private")
        super().start_controller()


@pytest.fixture
def accounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if why := missing() or (f"not installed: {', '.join(absent)} (make slurm-extras)" if absent else ""):
        pytest.skip(why)
    cluster = AccountedCluster(tmp_path / "accounted", 31500 + os.getpid() % 400)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setenv("MYSQL_UNIX_PORT", "")
    with started(cluster):
        yield cluster


def forgotten(cluster: Cluster, job: int) -> SlurmJob:
    """The job as sacct has it, once squeue no longer knows it."""

    def asked() -> bool:
        done = subprocess.run(["squeue", "-h", "--states=all", f"--jobs={job}"], capture_output=True, text=True, check=False)
        return "invalid job id" in done.stderr.lower()

    cluster.wait_for(asked, f"squeue to forget job {job}", 120)
    return scheduler.find_jobs([job])[job]


def test_jobs_that_squeue_has_forgotten_are_found(accounted: Cluster, run_config: Path, tmp_path: Path) -> None:
    """One finished, one was cancelled by hand in the queue."""
    words = ["launch.nodes=1", "launch.processes_per_node=2", "run.steps=2"]
    finished = submit(accounted, run_config, tmp_path / "finished", *words)
    job = finished.job
    assert finished.wait_over().state == "finished", finished.story()
    seen = forgotten(accounted, job)
    assert (seen.state, seen.nodes, seen.live) == ("COMPLETED", "node1", False) and seen.start, seen
    assert json.loads(phalanx("status", str(tmp_path / "finished"), "--json").stdout)["job"]["state"] == "COMPLETED"

    waits = submit(accounted, run_config, tmp_path / "waits", *words, "launch.slurm.extra=[--begin=now+1hour]")
    subprocess.run(["scancel", str(waits.job)], check=True)
    assert forgotten(accounted, waits.job).state == "CANCELLED", "sacct says: CANCELLED by 0"
    status = json.loads(phalanx("status", str(tmp_path / "waits"), "--json").stdout)
    assert (status["state"], status["why"]) == ("stopped", "cancelled while it waited")
    assert "no job of this run is live" in phalanx("cancel", str(tmp_path / "waits")).stdout
    assert phalanx("resume", str(tmp_path / "finished")).returncode == 0
