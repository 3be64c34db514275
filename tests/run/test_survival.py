"""Ended on request, or started in another way, a run ends as if nothing had happened. test_kills.py has kills and SIGTERM."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pretrain.run.folder import RunFolder
from tests.run.world import STEPS, check_equal, launch


@pytest.mark.prove
def test_ranks_that_import_themselves_end_in_the_same_weights(run_config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """As plain torchrun starts them; the undisturbed run's ranks were forked from one process."""
    command = launch(run_config, tmp_path / "run", "launch.shared_imports=false")
    assert command.end() == 0, command.errors
    check_equal(tmp_path / "run", undisturbed)


@pytest.mark.prove
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
