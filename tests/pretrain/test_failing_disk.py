"""Disks that fail while real ranks train: full, read-only, broken. The run tells it, trains on where it can, and loses nothing.

The faults are real: a tmpfs that is filled, a remount, and an ext4 file system on a loop device that the kernel makes read-only
(errors=remount-ro) or shuts down (EIO).
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pretrain.training_data
from launch.status import read_status
from pretrain.rank.stop_signals import StopSignals
from pretrain.run.beat import COMPUTING, RECORDING, SAVING
from pretrain.run.folder import RunFolder, complete_checkpoints
from pretrain.run.heartbeat import Heartbeat
from tests.pretrain.test_train import PP2_EP2, losses, same_checkpoint
from tests.pretrain.world import exit_code, spoiling, write_config
from tests.ranks import run_ranks

STEPS = 12
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """12 steps of a small MoE, a checkpoint every second step, of which the newest two are kept."""
    saves = {"checkpoint__interval_steps": 2, "checkpoint__keep": 2}
    path = tmp_path_factory.mktemp("disk") / "config.yaml"
    return write_config(path, folder, STEPS, schedule__horizon_steps=STEPS, run__eval_batches=0, **saves)


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The run on a sound disk."""
    run_dir = config.parent / "whole"
    assert attempt(config, run_dir, {}) == [0] * 4
    return run_dir


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system at a folder, with the given words of mount, and unmounts it at the end."""
    folders: list[Path] = []

    def mount(folder: Path, *words: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", *words, str(folder)], check=True)
        folders.append(folder)
        return folder

    yield mount
    for folder in reversed(folders):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """An ext4 file system of 32 MB on a loop device."""
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
        found = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device with ext4: {error}")
    yield found.stdout.strip()
    subprocess.run(["losetup", "-d", found.stdout.strip()], check=True)


# What happens to the disk when rank 0 enters a phase of a step.
Faults = dict[tuple[str, int], Callable[[], None]]


def attempt(config: Path, run_dir: Path, faults: Faults, *overrides: str, bad: tuple[int, ...] = ()) -> list[int]:
    """Exit codes of the 4 ranks of one attempt. The batches of the samples `bad` are spoiled."""
    return run_ranks(4, one_rank, ["--config", str(config), f"run.dir={run_dir}", *PP2_EP2, *overrides], faults, bad)


def one_rank(words: list[str], faults: Faults, bad: tuple[int, ...]) -> int:
    pretrain.training_data.micro_batches = spoiling(pretrain.training_data.micro_batches, bad)

    class Fateful(Heartbeat):
        def enter(self, phase: str, step: int | None = None) -> None:
            super().enter(phase, step)
            if os.environ["RANK"] == "0" and (fault := faults.pop((phase, self.step), None)):
                fault()

    return exit_code(words, StopSignals(beat=Fateful({})))


def fill(folder: Path) -> None:
    # Unbuffered: closing the file has nothing left to write.
    with open(folder / "filler", "ab", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(b"x" * 65536)


def kinds(run_dir: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (run_dir / "events.jsonl").read_text().splitlines()]


def whole_steps(run_dir: Path) -> list[int]:
    return [step for step, _ in complete_checkpoints(run_dir / "checkpoints")]


def test_a_full_disk_that_is_cleared_leaves_no_trace(
    config: Path, whole: Path, tmp_path: Path, mounted: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Full from step 4 until step 10. What a failed save frees is filled too. The page of the last rows takes a few more."""
    disk = mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=12m", "tmpfs")
    run_dir = disk / "run"

    def clear() -> None:
        assert whole_steps(run_dir) == [2], "the newest whole checkpoint stays, and no half one is taken for whole"
        assert (run_dir / "metrics.jsonl").read_text().count("\n") < 9
        (disk / "filler").unlink()

    faults: Faults = {(RECORDING, step): lambda: fill(disk) for step in range(4, 10)} | {(COMPUTING, 10): clear}
    assert attempt(config, run_dir, faults) == [0] * 4
    told = capfd.readouterr().err
    assert told.count("phalanx: save failed: ") == 3 and "No space left on device" in told
    assert told.count("phalanx: record refused: ") == 1 and "the disk must have room" in told
    assert told.count("phalanx: record accepted: ") == 1
    assert losses(run_dir) == losses(whole) and same_checkpoint(run_dir, whole, STEPS) and whole_steps(run_dir) == [12, 10]
    found = kinds(run_dir)
    assert [found.count(kind) for kind in ("save_failed", "record_refused", "record_accepted", "saved")] == [3, 1, 1, 3]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_0000010", "step_0000012"]
    times = [json.loads(line)["time"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert times == sorted(times), "events that waited keep their order and their times"


@pytest.mark.prove
def test_a_disk_that_stays_full_fails_the_run_at_its_end_and_the_next_attempt_goes_on(
    config: Path, whole: Path, tmp_path: Path, mounted: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=12m", "tmpfs")
    run_dir = disk / "run"
    assert attempt(config, run_dir, {(COMPUTING, 4): lambda: fill(disk)}) == [1] * 4
    assert "the end of the attempt can't be recorded" in capfd.readouterr().err
    assert whole_steps(run_dir) == [2] and not (run_dir / "DONE").exists()
    (disk / "filler").unlink()
    assert attempt(config, run_dir, {}) == [0] * 4
    assert losses(run_dir) == losses(whole) and same_checkpoint(run_dir, whole, STEPS)
    assert read_status(RunFolder(run_dir)).damage == []


def test_checkpoints_that_are_read_only_for_a_while(
    config: Path, whole: Path, tmp_path: Path, mounted: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """A file system of its own under checkpoints/, mounted read-only from step 4 to step 6. The record goes on."""
    run_dir = tmp_path / "run"
    checkpoints = mounted(run_dir / "checkpoints", "-t", "tmpfs", "-o", "size=12m", "tmpfs")

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(checkpoints)], check=True)

    assert attempt(config, run_dir, {(COMPUTING, 4): lambda: remount("ro"), (COMPUTING, 6): lambda: remount("rw")}) == [0] * 4
    told = capfd.readouterr().err
    assert told.count("phalanx: save failed: ") == 1 and "Read-only file system" in told and "record refused" not in told
    assert losses(run_dir) == losses(whole) and same_checkpoint(run_dir, whole, STEPS)


def shut_down(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    os.close(descriptor)


def repair(folder: Path, device: str) -> None:
    subprocess.run(["umount", str(folder)], check=True)
    subprocess.run(["fsck.ext4", "-p", device], capture_output=True, check=False)
    subprocess.run(["mount", device, str(folder)], check=True)


@pytest.mark.prove
@pytest.mark.parametrize(
    ("phase", "reason"),
    [(COMPUTING, "Input/output error"), (SAVING, "Input/output error"), (COMPUTING, "Read-only file system")],
)
def test_a_disk_that_breaks_fails_the_run_at_its_end_and_loses_no_whole_checkpoint(
    config: Path,
    whole: Path,
    tmp_path: Path,
    mounted: Callable[..., Path],
    loop_device: str,
    capfd: pytest.CaptureFixture[str],
    phase: str,
    reason: str,
) -> None:
    """The file system stops in step 4, with the record open. All ranks train to the end. After a repair the run goes on."""
    disk = mounted(tmp_path / "disk", "-o", "errors=remount-ro", loop_device)
    run_dir = disk / "run"

    def break_down() -> None:
        if reason == "Input/output error":
            shut_down(disk)
        else:
            Path(f"/sys/fs/ext4/{Path(loop_device).name}/trigger_fs_error").write_text("1")

    assert attempt(config, run_dir, {(phase, 4): break_down}) == [1] * 4
    told = capfd.readouterr().err
    assert told.count("phalanx: save failed: ") == 6, "steps 4, 6, 8, 10 and 12, and once more at the end"
    assert told.count("phalanx: record refused: ") == 1 and reason in told
    assert "the end of the attempt can't be recorded" in told
    repair(disk, loop_device)
    assert whole_steps(run_dir) == [2]
    assert attempt(config, run_dir, {}) == [0] * 4
    assert losses(run_dir) == losses(whole) and same_checkpoint(run_dir, whole, STEPS)


# Step 6 diverges, when no save is under way, and the run goes back to step 2.
BAD = (41,)
ROLLBACK = ("divergence.nonfinite=rollback", "divergence.rollback_checkpoints=2", "checkpoint.keep=3")


@pytest.mark.prove
@pytest.mark.parametrize("reason", ["Input/output error", "Read-only file system"])
def test_a_rollback_that_the_disk_refuses_is_done_by_the_next_attempt(
    config: Path,
    tmp_path: Path,
    mounted: Callable[..., Path],
    loop_device: str,
    capfd: pytest.CaptureFixture[str],
    reason: str,
) -> None:
    """EIO: the decision can't be recorded. Read-only checkpoints: it is, and the newer checkpoint can't be set aside."""
    assert attempt(config, tmp_path / "sound", {}, *ROLLBACK, bad=BAD) == [0] * 4
    run_dir = tmp_path / "disk" / "run"
    is_all = reason == "Input/output error"
    disk = mounted(run_dir.parent if is_all else run_dir / "checkpoints", loop_device)

    def refuse() -> None:
        shut_down(disk) if is_all else subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    assert attempt(config, run_dir, {(COMPUTING, 6): refuse}, *ROLLBACK, bad=BAD) == [1] * 4
    told = capfd.readouterr().err
    assert told.count("1 problem:") == 1 and told.count(reason) and "Traceback" not in told
    repair(disk, loop_device)
    assert kinds(run_dir).count("rolled_back") == (0 if is_all else 1) and whole_steps(run_dir) == [4, 2]
    if not is_all:
        assert json.loads((run_dir / "outcome.json").read_text())["why"].startswith("the file system must be writable")
    assert attempt(config, run_dir, {}, *ROLLBACK, bad=BAD) == [0] * 4
    assert kinds(run_dir).count("rolled_back") == 1
    assert losses(run_dir) == losses(tmp_path / "sound") and same_checkpoint(run_dir, tmp_path / "sound", STEPS)
