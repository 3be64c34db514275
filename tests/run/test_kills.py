"""Ten blows of the campaign (tests/chaos) on this machine, in two runs. `make prove-chaos` has them all, and Slurm's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.run.beat import BUILDING, COMPUTING, READING, RESTORING, SAVING, STARTING, VALIDATING
from pretrain.run.folder import RunFolder
from tests.chaos.campaign import run_case
from tests.chaos.check import check_checkpoints, check_run
from tests.chaos.local_runs import LocalRun
from tests.chaos.plan import LOCAL, TRAINING, Blow, Case
from tests.run.world import STEPS

RANK, SERVER, AGENT, LAUNCHER = (f"SIGKILL {who}" for who in ("a rank", "the fork server", "torchrun's agent", "the launcher"))


def blow(way: str, phase: str, steps: int = 0, delay_s: float | None = None, victim: int = 0) -> Blow:
    """Without `delay_s` rank 0 stands still meanwhile."""
    return Blow(way, phase, steps, delay_s is None, delay_s or 0.0, victim)


STARTED_AGAIN = (
    blow(LAUNCHER, SAVING, 2, 0.01), blow(AGENT, RESTORING), blow(RANK, TRAINING, 1, 0.05), blow("SIGTERM", READING),
    blow(SERVER, COMPUTING, 1), blow("SIGTERM", SAVING), blow(LAUNCHER, STARTING, 0, 0.3),
)  # fmt: skip
BY_ITSELF = (blow(RANK, SAVING, 2, victim=1), blow(SERVER, BUILDING), blow(RANK, VALIDATING, victim=0))


@pytest.mark.parametrize(("in_place", "blows"), [(False, STARTED_AGAIN), (True, BY_ITSELF)], ids=["again", "in_place"])
def test_blows_leave_no_trace(
    run_config: Path, undisturbed: Path, tmp_path: Path, in_place: bool, blows: tuple[Blow, ...]
) -> None:
    case, run_dir = Case(LOCAL, 0, in_place, blows), tmp_path / "run"
    rows = run_case(case, lambda: LocalRun(case, run_config, run_dir, STEPS), lambda: check_run(run_dir, undisturbed, STEPS))
    assert [(row.way, row.why) for row in rows] == [(blow.way, "") for blow in blows], rows


def test_a_half_checkpoint_is_a_loss(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "run" / "checkpoints")
    file = next((tmp_path / "run").rglob("*.safetensors"))
    with open(file, "rb+") as opened:
        opened.truncate(file.stat().st_size - 4096)
    with pytest.raises(DamagedFile, match=file.name):
        check_checkpoints(RunFolder(tmp_path / "run"), RunFolder(undisturbed))
