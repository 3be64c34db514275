"""checkpoint.resume_step on real ranks: the run goes on from an earlier checkpoint as another line, decided once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.run.files import iterate_lines
from tests.pretrain.test_train import attempt, events, losses, outcome, rows
from tests.pretrain.world import write_config
from tests.wandb_read import offline_rows

LINE = ("checkpoint.resume_step=2", "optimizer.lr=0.01", "checkpoint.allow_change=[optimizer]")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    saves = {"checkpoint__interval_steps": 2, "checkpoint__keep": 3}
    path = tmp_path_factory.mktemp("back") / "config.yaml"
    return write_config(path, folder, 6, schedule__horizon_steps=8, run__eval_batches=0, **saves)


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """Six steps, checkpoints of 2, 4 and 6."""
    run_dir = config.parent / "finished"
    assert attempt(config, run_dir, world=1) == [0]
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def held(run_dir: Path) -> list[str]:
    return sorted(path.name.removeprefix("step_000000") for path in (run_dir / "checkpoints").iterdir())


def went_back(run_dir: Path) -> list[dict[str, object]]:
    return [row for _, row in iterate_lines(run_dir / "events.jsonl") if row is not None and row["kind"] == "went_back"]


def test_a_finished_run_goes_back_and_the_line_that_was_left_stays_apart(config: Path, run_dir: Path) -> None:
    before, wandb_id = losses(run_dir), (run_dir / "wandb_id").read_text()
    assert held(run_dir) == ["2", "4", "6"] and (run_dir / "DONE").exists()
    # Stopped in step 3: saved there.
    assert attempt(config, run_dir, *LINE, world=1, request_at=3) == [130]
    assert held(run_dir) == ["2", "3", "4.rolled_back", "6.rolled_back"]
    assert not (run_dir / "DONE").exists()
    (event,) = went_back(run_dir)
    assert (event["from_step"], event["to_step"], event["consumed_samples"]) == (6, 2, 16)
    assert (run_dir / "wandb_id").read_text().strip() == event["wandb_id"] != wandb_id.strip()
    # The same words again, as after a preemption: from step 3 of the new line, not from 2 or 6.
    assert attempt(config, run_dir, *LINE, "run.steps=5", world=1) == [0]
    resumed = [row for _, row in iterate_lines(run_dir / "events.jsonl") if row is not None and row["kind"] == "resumed"]
    assert [row["step"] for row in resumed] == [2, 3]
    assert len(went_back(run_dir)) == 1
    # The left line's step 4 was passed, its step 6 was not.
    assert held(run_dir) == ["3", "4", "5", "6.rolled_back"]
    after = losses(run_dir)
    assert [after[step] for step in (1, 2)] == [before[step] for step in (1, 2)]
    assert after[4] != before[4] and len(after) == 5
    assert [row["samples"] for row in rows(run_dir)] == [8, 16, 24, 32, 40], "the same data again"
    # Finished is finished, with the same words too.
    assert attempt(config, run_dir, *LINE, "run.steps=5", world=1) == [0]
    assert outcome(run_dir)["attempt"] == 3


def test_the_new_line_equals_a_run_that_was_never_elsewhere(config: Path, run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert attempt(config, other, "run.steps=2", world=1) == [0]
    assert attempt(config, other, *LINE[1:], "run.steps=5", world=1) == [0]
    assert attempt(config, run_dir, *LINE, "checkpoint.keep=0", "run.steps=5", world=1) == [0]
    assert losses(run_dir) == losses(other)
    assert held(run_dir) == ["2", "4", "4.rolled_back", "5", "6.rolled_back"], "keep=0 keeps both lines"
    assert attempt(config, run_dir, *LINE, "checkpoint.keep=0", "run.steps=6", world=1) == [0]
    assert len(went_back(run_dir)) == 1, "with keep=0 the same words go on too"


def test_a_kill_in_the_middle_is_made_good(config: Path, run_dir: Path) -> None:
    """The decision is on the disk, one of two checkpoints is set aside, and the new name has no event yet."""
    checkpoints = run_dir / "checkpoints"
    event = {
        "time": 0.0, "attempt": 2, "kind": "went_back", "from_step": 6, "to_step": 2, "consumed_samples": 16,
        "checkpoints": ["step_0000004", "step_0000006"], "wandb_id": "abc",
    }  # fmt: skip
    begun = {"time": 0.0, "attempt": 2, "kind": "attempt", "wandb_id": "old", "logs": None, "slurm_job": None, "resume_step": 2}
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(begun) + "\n" + json.dumps(event) + "\n")
    (checkpoints / "step_0000004").rename(checkpoints / "step_0000004.rolled_back")
    (run_dir / "DONE").unlink()
    assert attempt(config, run_dir, *LINE, "run.steps=4", world=1) == [0]
    assert held(run_dir) == ["2", "4", "6.rolled_back"]
    assert events(run_dir).count("checkpoint_rolled_back") == 2 and len(went_back(run_dir)) == 1
    assert attempt(config, run_dir, *LINE, "run.steps=5", world=1) == [0]
    assert held(run_dir) == ["2", "4", "5", "6.rolled_back"], "the new line's step 4 stays"
    assert (run_dir / "wandb_id").read_text() == "abc\n"


def test_going_back_once_more_takes_an_attempt_without_the_words(config: Path, run_dir: Path) -> None:
    assert attempt(config, run_dir, *LINE, "run.steps=3", world=1) == [0]
    assert attempt(config, run_dir, *LINE[1:], "run.steps=4", world=1) == [0]
    assert attempt(config, run_dir, *LINE, "run.steps=4", world=1) == [0]
    assert [event["from_step"] for event in went_back(run_dir)] == [6, 4]
    # The first line's 4 was passed by the second's, that one is set aside for the third's, which then passes it.
    assert held(run_dir) == ["2", "4", "6.rolled_back"]


def test_a_step_that_is_not_there_changes_nothing(config: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (run_dir / "events.jsonl").read_text()
    assert attempt(config, run_dir, "checkpoint.resume_step=3", "run.steps=8", world=1) == [2]
    assert "complete ones beside it: steps 6, 4, 2" in capfd.readouterr().err
    assert (run_dir / "events.jsonl").read_text() == text and (run_dir / "DONE").exists()


@pytest.mark.prove
def test_wandb_gets_a_run_of_its_own(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B can't take rows back: the left line's run keeps its rows, the new one has the rows of the record."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir, sinks = tmp_path / "run", "metrics.sinks=[jsonl, wandb]"
    assert attempt(config, run_dir, sinks, world=1) == [0]
    left, before = (run_dir / "wandb_id").read_text().strip(), losses(run_dir)
    assert attempt(config, run_dir, *LINE, sinks, "run.steps=5", world=1) == [0]
    kept, new = (offline_rows(run_dir, name) for name in (left, (run_dir / "wandb_id").read_text().strip()))
    assert {int(row["step"]): float(row["loss"]) for row in kept} == pytest.approx(before)
    assert {int(row["step"]): float(row["loss"]) for row in new} == pytest.approx(losses(run_dir))


def test_damage_is_found_before_anything_is_set_aside(config: Path, run_dir: Path) -> None:
    victim = next((run_dir / "checkpoints" / "step_0000002").glob("rank_*"))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 4
    victim.write_bytes(data)
    assert attempt(config, run_dir, *LINE, world=1) == [2]
    assert held(run_dir) == ["2", "4", "6"] and not went_back(run_dir)
