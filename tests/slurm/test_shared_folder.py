"""A shared folder whose attributes each node caches, as file servers' clients do. What another node writes is seen late."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run.world import check_equal
from tests.slurm import world
from tests.slurm.cluster import Cluster, missing, started
from tests.slurm.world import STEPS, act, submit

pytestmark = [pytest.mark.slurm, pytest.mark.prove, pytest.mark.timeout(900)]

CACHED_S = 15


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The folder as all see it. Here it is the real one, on each node a FUSE mount of it, with a cache of its own."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def caching(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    if why := missing() or ("" if shutil.which("bindfs") else "not installed: bindfs (make slurm-extras)"):
        pytest.skip(why)
    names = ("attr_timeout", "entry_timeout", "negative_timeout")
    options = ",".join(f"{name}={CACHED_S}" for name in names)
    cluster = Cluster(tmp_path / "cluster", 3, setup=f"bindfs -o {options} '{shared}' '{shared}' || exit 1")
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    with started(cluster):
        yield cluster


def test_a_run_survives_where_others_writes_are_seen_late(caching: Cluster, run_config: Path, quiet: Path, shared: Path) -> None:
    mounts = ["srun", "--nodes=3", "--ntasks-per-node=1", "findmnt", "-n", "-o", "FSTYPE", "--target", str(shared)]
    assert subprocess.run(mounts, check=True, capture_output=True, text=True).stdout.split() == ["fuse"] * 3
    run = submit(caching, run_config, shared / "run")
    act(run, world.usr1)
    act(run, world.kill_a_rank)
    assert run.wait_over().state == "finished", run.story()
    check_equal(run.folder.path, quiet, STEPS)
