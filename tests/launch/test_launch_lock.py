"""Two launches at once into one run folder: one trains, the other one is refused with the name of the first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.errors import ConfigError
from launch.launch_lock import launch_lock
from pretrain.run.folder import RunFolder, is_run_folder


def test_a_second_launch_is_told_who_launches(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with launch_lock(folder, 0.0):
        with (
            pytest.raises(ConfigError, match=rf"one launch at a time in a run folder; process {os.getpid()} on .* launches here"),
            launch_lock(folder, 0.2),
        ):
            pass
        assert not is_run_folder(folder), "the lock alone makes no run"
    with launch_lock(folder, 0.0):
        pass


def test_the_lock_ends_with_a_killed_launcher(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    child = os.fork()
    if child == 0:
        with launch_lock(folder, 0.0):
            os.kill(os.getpid(), 9)
    assert os.waitpid(child, 0)[1] == 9, "the child was killed while it held the lock"
    with launch_lock(folder, 0.0):
        pass
