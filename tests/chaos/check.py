"""What must hold of a run after any blows. In: its folder and an undisturbed run's. Out: AssertionError names what does not."""

from __future__ import annotations

import filecmp
import time
from pathlib import Path

import psutil

from pretrain.checkpoint.manifest import read_index
from pretrain.checkpoint.read import CheckpointReader
from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.folder import RunFolder, complete_checkpoints, step_folder, unfinished_folders
from tests.run.world import check_equal

ORPHAN_S = 20.0


def check_run(run_dir: Path, undisturbed: Path, last: int) -> None:
    """The same weights, record and W&B steps; one W&B run; whole checkpoints only; no process left."""
    folder = RunFolder(run_dir)
    check_equal(run_dir, undisturbed, last)
    ids = {row["wandb_id"] for row in read_events(folder) if row["kind"] == EventKind.ATTEMPT}
    files = {path.stem.removeprefix("run-") for path in folder.wandb.glob("*run-*/run-*.wandb")}
    assert ids == files == {folder.wandb_id.read_text().strip()}, f"W&B runs {ids}, files of {files}"
    assert unfinished_folders(folder.checkpoints) == []
    check_checkpoints(folder, RunFolder(undisturbed))
    check_no_orphan(run_dir)


def check_checkpoints(folder: RunFolder, undisturbed: RunFolder) -> None:
    """Each that is marked complete can be read whole, and has the undisturbed run's bytes where that one saved, too."""
    for step, path in complete_checkpoints(folder.checkpoints):
        reader = CheckpointReader(path)
        for stored in read_index(path):
            reader.read(stored)
        for other in step_folder(undisturbed.checkpoints, step).glob("*.safetensors"):
            assert filecmp.cmp(path / other.name, other, shallow=False), f"{path / other.name} differs"


def check_no_orphan(run_dir: Path) -> None:
    """No process has the run's folder in its environment or its command line."""
    deadline = time.monotonic() + ORPHAN_S
    while left := _processes_of(str(run_dir)):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.2)


def _processes_of(word: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.environ().items(), *enumerate(process.cmdline())]
            if any(word in str(value) for _, value in words):
                found.append(f"{process.pid} {process.name()}")
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return found
