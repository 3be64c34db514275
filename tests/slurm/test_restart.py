"""Restarts inside of the allocation: no queue, the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.run.beat import COMPUTING
from tests.run.world import check_equal
from tests.slurm import world
from tests.slurm.cluster import Cluster
from tests.slurm.world import STEPS, act, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_crash_and_a_lost_node_cost_no_requeue_with_a_spare_and_the_first_node_costs_one(
    cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path
) -> None:
    run = submit(cluster, run_config, tmp_path / "run", "launch.slurm.spare_nodes=1", "launch.restart.standby_after_s=0")
    run.wait_to_train()
    act(run, world.kill_a_rank_beside_standbys, phase=COMPUTING)
    act(run, world.power_off)
    run.wait(lambda: len(run.events("job_restarted")) == 2, "the second restart")
    assert [row["nodes"] for row in run.events("job_restarted")] == [["node1", "node2"], ["node1", "node3"]], run.story()
    assert not run.events("job_requeued") and {row["restarts"] for row in run.events("job_attempt")} == {0}, run.story()
    act(run, world.power_off_first)
    life = run.wait_over()
    assert [end.cause for end in life.ends] == ["crashed", "bad_node", "bad_node", "finished"], run.story()
    restarts = [row["restarts"] for row in run.events("job_attempt")]
    assert restarts[:3] == [0, 0, 0] and restarts[3] > 0, run.story()
    check_equal(run.folder.path, quiet, STEPS)
    # The attempt after the crash alone has the nodes of the one before.
    assert run.story().count("its nodes have imported the libraries") == 1, run.story()
    cluster.wait_for(lambda: not run.standbys(), "the end of the last standby", 60)


@pytest.mark.prove
def test_a_step_waits_where_memory_is_counted_by_core(cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path) -> None:
    """The job has some cores and the memory that the site gives with each, no node as a whole, and no node more than it uses."""
    words = ["launch.slurm.extra=[]", "launch.slurm.cpus_per_task=2", "launch.restart.standby_after_s=0"]
    run = submit(cluster, run_config, tmp_path / "run", *words)
    act(run, world.kill_a_rank_beside_standbys, phase=COMPUTING)
    assert run.wait_over().state == "finished" and not run.events("job_requeued"), run.story()
    assert run.story().count("its nodes have imported the libraries") == 1, run.story()
    check_equal(run.folder.path, quiet, STEPS)
