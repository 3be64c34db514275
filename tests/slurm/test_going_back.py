"""checkpoint.resume_step under Slurm: the batch step's later attempts go on from the new line, not from the one that was left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run.world import check_equal
from tests.slurm.cluster import Cluster
from tests.slurm.world import STEPS, act, kill_a_rank, phalanx, preempt, submit

pytestmark = [pytest.mark.slurm, pytest.mark.prove, pytest.mark.timeout(900)]


def test_a_requeue_goes_on_from_the_new_line(cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path) -> None:
    """A finished run goes back to step 8. Its new line crashes before it has saved, and is then preempted, which saves."""
    run = submit(cluster, run_config, tmp_path / "run", "checkpoint.keep=0")
    assert run.wait_over().state == "finished", run.story()
    cluster.wait_for(lambda: cluster.node_states().count("idle") == len(cluster.nodes), "the first job's end", 60)
    words = ("checkpoint.resume_step=8", "checkpoint.interval_steps=100")
    resumed = phalanx("resume", str(run.folder.path), *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "set aside as .rolled_back" in resumed.stdout + resumed.stderr
    act(run, kill_a_rank)
    act(run, preempt)
    assert run.wait_over().state == "finished", run.story()
    (event,) = run.events("went_back")
    assert (event["from_step"], event["to_step"]) == (STEPS, 8)
    crashed, preempted, last = (row["step"] for row in run.events("resumed"))
    assert crashed == preempted == 8 < last < STEPS, run.story()
    first, *new = (row["wandb_id"] for row in run.events("attempt"))
    assert new[1:] == [event["wandb_id"]] * 2 and event["wandb_id"] != first, run.story()
    assert (run.folder.path / "checkpoints" / f"step_{STEPS:07d}.rolled_back").exists(), "keep=0 keeps the line that was left"
    check_equal(run.folder.path, quiet, STEPS, None)
