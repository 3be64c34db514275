"""Whole attempts through pretrain/main.py on forked ranks: going on, stopping, damage, other layouts, warm start."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.metrics.expert_counts import read_expert_counts
from pretrain.rank.stop_signals import StopSignals
from pretrain.run.beat import COMPUTING
from pretrain.run.files import iterate_lines
from pretrain.run.heartbeat import Heartbeat
from tests.pretrain.world import exit_code, write_config
from tests.ranks import run_ranks

PP2_EP2 = ("parallel.pipeline=2", "parallel.expert=2", "launch.processes_per_node=4")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A config file over the shared corpus: 4 layers, 8 experts, a step in some 0.1 s."""
    path = tmp_path_factory.mktemp("train") / "config.yaml"
    every = {"checkpoint__interval_steps": 3, "metrics__expert_counts_interval_steps": 2}
    return write_config(path, folder, 6, schedule__horizon_steps=6, run__eval_batches=1, **every)


def attempt(config: Path, run_dir: Path, *overrides: str, world: int = 4, request_at: int = 0) -> list[int]:
    """Exit codes of the ranks of one attempt."""
    words = ["--config", str(config), f"run.dir={run_dir}", *(PP2_EP2 if world == 4 else ()), *overrides]
    return run_ranks(world, one_rank, words, request_at)


def one_rank(words: list[str], request_at: int) -> int:
    class AskedAt(Heartbeat):
        """A stop that is asked for while step `request_at` runs."""

        def enter(self, phase: str, step: int | None = None) -> None:
            super().enter(phase, step)
            if (phase, self.step) == (COMPUTING, request_at):
                signals.requested, signals.signal_name = 1, "SIGINT"

    signals = StopSignals(beat=AskedAt({}))
    return exit_code(words, signals)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for _, row in iterate_lines(run_dir / "metrics.jsonl") if row is not None]


def events(run_dir: Path) -> list[str]:
    return [row["kind"] for _, row in iterate_lines(run_dir / "events.jsonl") if row is not None]


def outcome(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "outcome.json").read_text())


def losses(run_dir: Path) -> dict[int, float]:
    found = {row["step"]: row["loss"] for row in rows(run_dir)}
    assert sorted(found) == list(range(1, len(rows(run_dir)) + 1)), "each step once"
    return found


def same_checkpoint(one: Path, other: Path, step: int = 6) -> bool:
    folders = [path / "checkpoints" / f"step_{step:07d}" for path in (one, other)]
    names = [sorted(file.name for file in folder.glob("*.safetensors")) for folder in folders]
    assert names[0] == names[1] and names[0]
    return all(filecmp.cmp(folders[0] / name, folders[1] / name, shallow=False) for name in names[0])


@pytest.fixture(scope="module")
def six_steps(config: Path) -> Path:
    run_dir = config.parent / "whole"
    assert attempt(config, run_dir) == [0] * 4
    return run_dir


@pytest.fixture
def whole(six_steps: Path, tmp_path: Path) -> Path:
    """Six steps in one go; the test's own copy."""
    return shutil.copytree(six_steps, tmp_path / "whole")


def test_three_steps_and_three_are_six_bit_for_bit(config: Path, tmp_path: Path, whole: Path) -> None:
    parts = tmp_path / "parts"
    assert attempt(config, parts, "run.steps=3") == [0] * 4
    assert (parts / "DONE").exists()
    assert attempt(config, parts, "run.steps=3") == [0] * 4
    assert outcome(parts)["attempt"] == 1, "a finished run is not started again"
    assert attempt(config, parts) == [0] * 4
    assert losses(parts) == losses(whole)
    assert same_checkpoint(parts, whole)
    assert (parts / "experts.jsonl").read_text() == (whole / "experts.jsonl").read_text()
    assert [row["step"] for row in read_expert_counts(whole / "experts.jsonl")] == [2, 4, 6]
    assert outcome(parts) | {"time": 0} == {
        "attempt": 2, "state": "finished", "why": "all 6 steps are done", "step": 6, "consumed_samples": 48, "time": 0,
    }  # fmt: skip
    # Another layout, engine stage and micro-batch go on from there with the same numbers.
    other = tmp_path / "other"
    shutil.copytree(parts, other)
    for step in (6,):
        shutil.rmtree(other / "checkpoints" / f"step_{step:07d}")
    changed = ("parallel.tensor=2", "zero.stage=0", "launch.processes_per_node=2")
    assert attempt(config, other, *changed, world=2) == [0] * 2
    assert losses(other) == pytest.approx(losses(whole), rel=1e-6)
    assert (other / "experts.jsonl").read_text() == (whole / "experts.jsonl").read_text()
    assert rows(other)[-1]["val_loss"] == pytest.approx(rows(whole)[-1]["val_loss"], rel=1e-6)


# tests/run/test_kills.py stops whole runs by SIGTERM every day.
@pytest.mark.prove
def test_a_stop_saves_and_going_on_equals_going_through(config: Path, tmp_path: Path, whole: Path) -> None:
    stopped = tmp_path / "stopped"
    assert attempt(config, stopped, request_at=2) == [130] * 4
    assert (outcome(stopped)["state"], outcome(stopped)["step"]) == ("stopped", 2)
    assert not (stopped / "DONE").exists()
    assert attempt(config, stopped) == [0] * 4
    assert losses(stopped) == losses(whole)
    assert same_checkpoint(stopped, whole)


def test_a_growing_batch_goes_on_where_it_stopped(config: Path, tmp_path: Path) -> None:
    """4, 4, 6, 6, 8, 8 sequences: counted in samples, whatever the attempt."""
    ramp = ("batch.ramp.start_seqs=4", "batch.ramp.increment_seqs=2", "batch.ramp.samples=16")
    assert attempt(config, tmp_path / "whole", *ramp) == [0] * 4
    assert attempt(config, tmp_path / "parts", *ramp, "run.steps=3") == [0] * 4
    assert attempt(config, tmp_path / "parts", *ramp) == [0] * 4
    samples = [row["samples"] for row in rows(tmp_path / "whole")]
    sizes = [after - before for before, after in zip([0, *samples], samples, strict=False)]
    assert sizes == sorted(sizes) and sizes[0] == 4 and sizes[-1] == 8 and len(set(sizes)) > 1
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same_checkpoint(tmp_path / "parts", tmp_path / "whole")


def test_a_profile_is_written_for_its_window(config: Path, tmp_path: Path) -> None:
    words = ("run.steps=3", "metrics.profile.start_step=2", "metrics.profile.num_steps=1", "checkpoint.save_at_end=false")
    assert attempt(config, tmp_path / "run", *words) == [0] * 4
    assert [path.name for path in (tmp_path / "run" / "profile").iterdir()] == ["rank_0.trace.json"]
    assert not list((tmp_path / "run" / "checkpoints").glob("step_0000002")), "nothing was due"


def test_damage_is_passed_over_loudly_but_refused_by_name(
    config: Path, tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    victim = next((whole / "checkpoints" / "step_0000006").glob("rank_00002*"))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 4
    victim.write_bytes(data)
    named = tmp_path / "named"
    shutil.copytree(whole, named)
    assert attempt(config, named, "run.steps=7", "checkpoint.resume_step=6") == [2] * 4
    assert "holds other bytes than were written" in capfd.readouterr().err
    assert (named / "checkpoints" / "step_0000006").exists()
    before = losses(whole)
    (whole / "DONE").unlink()
    assert attempt(config, whole) == [0] * 4
    assert "checkpoint_damaged" in events(whole)
    assert (whole / "checkpoints" / "step_0000006.damaged").exists()
    assert losses(whole) == before, "steps 4 to 6 again, from step 3"
    for folder in (whole / "checkpoints").glob("step_*"):
        (folder / "manifest.json").write_text("{}")
    assert attempt(config, whole, "run.steps=8") == [2] * 4
    assert "starting at step 0 would throw the run away" in outcome(whole)["why"] or outcome(whole)["state"] == "failed"


def test_what_may_not_change_is_refused_and_nothing_is_touched(config: Path, whole: Path) -> None:
    text = (whole / "config.yaml").read_text()
    for words in (["model.hidden_size=64"], ["optimizer.lr=0.5"], ["data.valid_fraction=0.3"]):
        assert attempt(config, whole, "run.steps=8", *words) == [2] * 4
    assert (whole / "config.yaml").read_text() == text
    assert len(rows(whole)) == 6
    assert attempt(config, whole, "run.steps=7", "optimizer.lr=0.001", "checkpoint.allow_change=[optimizer.lr]") == [0] * 4
    assert len(rows(whole)) == 7


def test_another_optimizer_needs_a_word_and_starts_afresh(config: Path, whole: Path) -> None:
    def kept() -> list[str]:
        return sorted(path.name for path in (whole / "checkpoints").iterdir())

    before, muon = kept(), ("run.steps=7", "optimizer.kind=muon", "checkpoint.keep=0")
    assert attempt(config, whole, *muon) == [2] * 4
    assert kept() == before
    assert attempt(config, whole, *muon, "checkpoint.allow_change=[optimizer]") == [0] * 4
    assert "optimizer_reset" in events(whole) and "checkpoint_damaged" not in events(whole)
    assert kept() == [*before, "step_0000007"]
    manifest = json.loads((whole / "checkpoints" / "step_0000007" / "manifest.json").read_text())
    assert (manifest["optimizer_steps"], "momentum" in manifest["kinds"]) == (1, True)
    # Back again, on other ranks, from a checkpoint whose router weights Muon did not update.
    adamw = ("run.steps=8", "optimizer.muon.router=muon", "optimizer.kind=adamw", "checkpoint.keep=0")
    assert attempt(config, whole, *adamw, "checkpoint.allow_change=[optimizer]", "parallel.pipeline=1") == [0] * 4
    assert events(whole).count("optimizer_reset") == 2 and kept() == [*before, "step_0000007", "step_0000008"]


@pytest.mark.parametrize("by", ["another version", "another config"])
def test_a_whole_checkpoint_that_does_not_fit_is_refused_and_not_renamed(
    config: Path, whole: Path, by: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = whole / "checkpoints" / "step_0000006"
    file = folder / ("manifest.json" if by == "another version" else "index.json")
    value = json.loads(file.read_text())
    if by == "another version":
        value["format"] = 2
    else:
        value = {
            name: {key: crc for key, crc in sums.items() if not key.startswith("exp_avg:decoder.layers.3.")}
            for name, sums in value.items()
        }
    file.write_text(json.dumps(value))
    assert attempt(config, whole, "run.steps=7") == [2] * 4
    assert folder.exists() and "checkpoint_damaged" not in events(whole)
    assert "whole checkpoint that this" in capfd.readouterr().err


def test_warm_start_takes_the_weights_only(config: Path, tmp_path: Path, whole: Path) -> None:
    warm = tmp_path / "warm"
    words = (f"checkpoint.load={whole}", "run.steps=1", "optimizer.lr=1e-9", "schedule.horizon_steps=2")
    assert attempt(config, warm, *words) == [0] * 4
    assert rows(warm)[0]["val_loss"] == pytest.approx(rows(whole)[-1]["val_loss"], rel=1e-5)
    assert rows(warm)[0]["tokens"] == 8 * 32


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(config: Path, tmp_path: Path) -> None:
    blown = tmp_path / "blown"
    assert attempt(config, blown, "optimizer.lr=1e30", "optimizer.clip_grad_norm=0", "schedule.warmup_steps=0") == [3] * 4
    assert outcome(blown)["state"] == "diverged"
    assert not list((blown / "checkpoints").iterdir())
    assert "nonfinite" in rows(blown)[-1]


def test_bad_input_is_one_report_and_exit_2(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("parallel.tensor=3", "modle.num_layers=2", "data.train=[{path: nowhere}]")
    assert attempt(config, tmp_path / "bad", *words) == [2] * 4
    assert attempt(config, tmp_path / "bad", "parallel.tensor=3", "data.train=[{path: nowhere}]") == [2] * 4
    text = capfd.readouterr().err
    assert len(re.findall(r"^\d+ problems?:$", text, re.MULTILINE)) == 2, "rank 0 alone reports, once an attempt"
    assert "did you mean model.num_layers" in text
    assert "parallel.tensor = 3" in text and "nowhere" in text and "Traceback" not in text
    assert not (tmp_path / "bad").exists()


def test_a_world_other_than_stated_is_refused(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(config), f"run.dir={tmp_path / 'run'}", *PP2_EP2]
    assert run_ranks(2, one_rank, words, 0) == [2, 2]
    assert "must equal the 2 processes that were started" in capfd.readouterr().err
