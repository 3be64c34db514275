"""Killed at any moment, a run started again ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from pretrain.run.folder import RunFolder
from tests.run.world import STEPS, check_equal, kill_at_random, launch


def finish(config: Path, run_dir: Path, kills: int, generator: random.Random) -> list[str]:
    """Kill that often, then let it end; who was hit."""
    hit = []
    for _ in range(kills):
        command = launch(config, run_dir)
        hit.append(kill_at_random(command, generator))
        command.end()
    last = launch(config, run_dir)
    assert last.end() == 0, f"after killing {hit}: {last.errors}"
    return hit


def test_kills_leave_no_trace(run_config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One here, twenty in `make prove`."""
    finish(run_config, tmp_path / "killed", 1, random.Random(5))
    check_equal(tmp_path / "killed", undisturbed)


@pytest.mark.prove
def test_ranks_that_import_themselves_end_in_the_same_weights(run_config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """As plain torchrun starts them; the undisturbed run's ranks were forked from one process."""
    command = launch(run_config, tmp_path / "run", "launch.shared_imports=false")
    assert command.end() == 0, command.errors
    check_equal(tmp_path / "run", undisturbed)


def test_ctrl_c_saves_and_going_on_leaves_no_trace(run_config: Path, undisturbed: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    command = launch(run_config, stopped)
    command.wait_for_step(3)
    command.process.send_signal(signal.SIGINT)
    assert command.end() == 130, command.errors
    outcome = RunFolder(stopped).read_outcome()
    assert outcome is not None and outcome.state == "stopped" and 3 <= outcome.step < STEPS
    assert launch(run_config, stopped).end() == 0
    check_equal(stopped, undisturbed)


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(10))
def test_random_kills_leave_no_trace(run_config: Path, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    """Twenty kills of random victims at random moments, two a run; a checkpoint is under way at most of them."""
    finish(run_config, tmp_path / "killed", 2, random.Random(seed))
    check_equal(tmp_path / "killed", undisturbed)
