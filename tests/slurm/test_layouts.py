"""A layout over nodes trains to the weights of the same layout on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run.world import check_equal, launch
from tests.slurm.cluster import Cluster
from tests.slurm.world import WORDS, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 4


# Stages on two nodes: test_survival.py, every day.
@pytest.mark.prove
@pytest.mark.parametrize(
    "degrees",
    [{"pipeline": 2, "expert": 2}, {"tensor": 4, "pipeline": 1}, {"expert": 4, "pipeline": 1}],
    ids=lambda degrees: "-".join(f"{axis}{degree}" for axis, degree in degrees.items()),
)
def test_two_nodes_of_two_ranks_train_as_four_ranks_here(
    cluster: Cluster, run_config: Path, tmp_path: Path, degrees: dict[str, int]
) -> None:
    words = [f"run.steps={STEPS}", "checkpoint.interval_steps=null", "launch.slurm.extra=[]"]
    words += ["model.attention.num_query_groups=4", *(f"parallel.{axis}={degree}" for axis, degree in degrees.items())]
    run = submit(cluster, run_config, tmp_path / "slurm", *words, "launch.processes_per_node=2")
    here = launch(run_config, tmp_path / "here", *WORDS, *words, "launch.processes_per_node=4")
    assert here.end() == 0, here.errors
    assert run.wait_over().state == "finished", run.story()
    assert len(run.events("job_attempt")[0]["nodes"]) == 2
    check_equal(run.folder.path, tmp_path / "here", STEPS)
