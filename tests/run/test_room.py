"""Room for a checkpoint is looked for before the start, and a full disk is named at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.load import load_config
from launch.status import read_status
from launch.status_text import describe
from pretrain.preflight.disk_space import check_disk_space, free_bytes
from pretrain.run.folder import RunFolder
from tests.run.world import last_step, launch
from tests.tmpfs import mounted_tmpfs


def test_a_model_larger_than_the_disk_is_refused_with_figures(tmp_path: Path) -> None:
    config = load_config("model/llama3_405b").config
    (problem,) = check_disk_space(config, 128256, RunFolder(tmp_path / "not" / "there"))
    assert problem.path == "run.dir" and "one checkpoint takes 5,681,9" in problem.rule and "MB free" in problem.rule
    config.checkpoint.save_at_end = False
    assert check_disk_space(config, 128256, RunFolder(tmp_path)) == [], "nothing is saved"
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB; a checkpoint of the small run takes 1.7."""
    with mounted_tmpfs(tmp_path / "small", "1536k") as folder:
        yield folder


def test_a_disk_that_is_too_small_is_one_report_before_the_first_step(run_config: Path, small_disk: Path) -> None:
    command = launch(run_config, small_disk / "run")
    assert command.end() == 2, command.errors
    assert "one checkpoint takes" in command.errors and "Traceback" not in command.errors
    assert not (small_disk / "run" / "checkpoints").exists()


@pytest.mark.prove
def test_a_disk_that_fills_up_is_named_at_the_end(run_config: Path, small_disk: Path) -> None:
    """Rows, events and logs are on it. The run trains to its end, and `status` tells what no file can."""
    run_dir = small_disk / "run"
    command = launch(run_config, run_dir, "checkpoint.save_at_end=false", "checkpoint.interval_steps=null", "run.steps=100")
    command.wait_for_step(2)
    # Unbuffered: closing the file has nothing left to write.
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(b"x" * 65536)
    assert "the file system is full" in describe(read_status(command.folder))
    assert command.end() == 1
    assert f"the file system of {run_dir} is full" in command.errors and "Traceback" not in command.errors
    assert not command.folder.done.exists() and last_step(command.folder) < 100
