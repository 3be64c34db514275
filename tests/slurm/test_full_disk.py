"""The run folder's file system fills up under a job: batch step, agents and ranks live on, and the run ends as if it had not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.run.beat import BEAT_DIR, beat_path, decode
from tests.pretrain.test_failing_disk import fill
from tests.run.world import check_equal
from tests.slurm.cluster import Cluster, missing, started
from tests.slurm.test_survival import check_one_run
from tests.slurm.world import STEPS, kill_a_rank, submit
from tests.tmpfs import mounted_tmpfs

pytestmark = [pytest.mark.slurm, pytest.mark.prove, pytest.mark.timeout(900)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB. Nodes that are powered on afterwards have it too."""
    if why := missing():
        pytest.skip(why)
    with mounted_tmpfs(tmp_path / "disk", "48m") as folder:
        yield folder


@pytest.fixture
def own_cluster(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "cluster", 2)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    with started(cluster):
        yield cluster


def test_a_full_disk_under_a_job(own_cluster: Cluster, disk: Path, run_config: Path, quiet: Path) -> None:
    """Full for six steps and a save. Slurm, too, writes its output there."""
    run = submit(own_cluster, run_config, disk / "run")
    run.wait_to_train()
    rank = run.ranks()[0]
    beat = beat_path(Path(f"/proc/{rank.pid}/root{rank.environ()[BEAT_DIR]}"), 0)

    def step() -> int:
        found = decode(beat.read_bytes())
        return found.step if found is not None else 0

    full_at = step()
    while step() < full_at + 6:
        # What a failed save frees is filled too.
        fill(disk)
    assert len(run.ranks()) == 2
    (disk / "filler").unlink()
    check_one_run(run, quiet, [])
    assert run.events("save_failed") and len(run.events("job_attempt")) == 1, run.story()


def test_a_restart_in_place_waits_for_the_disk(own_cluster: Cluster, disk: Path, run_config: Path, quiet: Path) -> None:
    """A rank is killed while the disk is full: the end of the attempt and the next attempt wait for room."""
    run = submit(own_cluster, run_config, disk / "run")
    run.wait_to_train()
    fill(disk)
    kill_a_rank(run)
    for _ in range(15):
        # What ended processes free is filled too.
        fill(disk)
        time.sleep(1)
    assert len(run.events("job_attempt")) == 1, run.story()
    (disk / "filler").unlink()
    assert run.wait_over().state == "finished", run.story()
    # Why the first one ended is written nowhere, so that its cause may be killed, too.
    assert [end.cause for end in run.life.ends] in (["crashed", "finished"], ["killed", "finished"]), run.story()
    assert len(run.events("job_restarted")) == 1 and not run.events("job_requeued"), run.story()
    check_equal(run.folder.path, quiet, STEPS)
