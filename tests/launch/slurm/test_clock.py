"""Slurm's early announcement of the time limit is not taken for a preemption."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch.slurm.clock import TimeLimitClock
from pretrain.run.folder import RunFolder


@pytest.mark.parametrize(
    ("left_s", "near", "announced"),
    [(3600, False, False), (200, False, False), (120, False, True), (86, False, True), (20, True, True)],
)
def test_a_signal_up_to_a_minute_early_is_the_time_limits(
    left_s: float, near: bool, announced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sbatch --signal=USR1@60` signalled 86 s before the limit. Without Slurm's commands the environment counts."""
    monkeypatch.setenv("PATH", str(tmp_path))
    # The attempt began with an hour, and the end has come near since.
    clock = TimeLimitClock(RunFolder(tmp_path), 1, 60.0, {"SLURM_JOB_END_TIME": str(int(time.time() + 3600))})
    monkeypatch.setattr(clock, "_limit_s", time.time() + left_s)
    assert (clock.is_near(), clock.is_announced()) == (near, announced)
