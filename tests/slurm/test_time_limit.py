"""Jobs that reach a real time limit of two minutes. Nothing but Slurm signals them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.world import phalanx, submit

pytestmark = [pytest.mark.slurm, pytest.mark.prove, pytest.mark.timeout(900)]

# A start of the ranks that takes longer than the limit.
SLOW = """\
#!/bin/bash
[ "$3" != launch.torchrun ] || exec sleep 300
exec {python} "$@"
"""


def test_a_time_limit_is_no_preemption_and_a_longer_start_is_given_up(cluster: Cluster, run_config: Path, tmp_path: Path) -> None:
    words = ["run.steps=100000", "launch.nodes=1", "launch.processes_per_node=2", "run.eval_interval_steps=null",
             "launch.slurm.time=2", "launch.slurm.stop_before_s=20", "launch.slurm.max_without_progress=2"]  # fmt: skip
    slow = tmp_path / "python"
    slow.write_text(SLOW.format(python=sys.executable))
    slow.chmod(0o700)
    trains = submit(cluster, run_config, tmp_path / "trains", *words)
    starts = submit(cluster, run_config, tmp_path / "starts", *words, f"launch.slurm.python={slow}")
    trains.wait(lambda: len(trains.life.ends) >= 2, "two time limits", 400)
    assert all(end.cause == "time_limit" and end.step_after > end.step_before for end in trains.life.ends), trains.story()
    assert phalanx("cancel", str(tmp_path / "trains")).returncode == 0
    life = starts.wait_over()
    assert life.state == "gave_up" and [end.cause for end in life.ends] == ["time_limit", "time_limit"], starts.story()
    assert "the time limit is near before the first step" in life.why
