"""Steps that are not applied, on real ranks: nothing moves, a rollback passes the batches over, a kill changes nothing.

A batch is spoiled where it is read: a loss mask of 3e38 makes the loss infinite. Nothing of the product knows of it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import pretrain.loop
import pretrain.training_data
from configs.schema import Config
from pretrain.data.batches import MicroBatch
from pretrain.run.files import iterate_lines, last_row
from pretrain.run.folder import RunFolder
from pretrain.run.follow import RecordFollower
from pretrain.run.record import Record
from tests.pretrain.deepspeed_world import Keys, name_of, zero
from tests.pretrain.engine.test_deepspeed_state import fill, make
from tests.pretrain.model.test_parity import EP, PP, TP
from tests.pretrain.test_train import events, outcome, rows, same_checkpoint
from tests.pretrain.world import assemble, batches_of, exit_code, owned_values, small_config, spoiling, write_config
from tests.ranks import RankFailed, run_ranks
from tests.wandb_read import offline_rows

MEGATRON: Keys = {"zero__stage": 1}
BIASED = {"model__moe__router__score": "sigmoid", "model__moe__router__expert_bias": True}
MUON: Keys = {"optimizer__kind": "muon", "optimizer__muon__qk_clip": 0.4, "model__attention__qk_norm": False}

# An engine whose step is refused.


def refuse_nothing(loss: float, grad_norm: float) -> bool:
    return True


def refuse_all(loss: float, grad_norm: float) -> bool:
    return False


def with_refused_steps(config: Config, is_refused: bool) -> Any:
    """Steps 0 and 2, between them some that are refused; then back to the state after step 0, and step 2 again.

    (was all as before the refused steps, names of what was compared, state after step 2, was step 2 again the same)
    """
    engine, groups = make(config)

    def batches(step: int) -> list[MicroBatch]:
        return batches_of(config, step, groups.dp.rank(), groups.dp.size())

    assert engine.step(batches(0), 3e-3).applied
    before = owned_values(engine)
    if is_refused:
        assert not engine.step(batches(1), 3e-3, refuse_all).applied
        spoiled = batches(1)
        spoiled[0].loss_mask[0, 0] = 3e38
        assert not engine.step(spoiled, 3e-3).applied and engine.optimizer_steps() == 1
    untouched = [key for key, values in owned_values(engine).items() if np.array_equal(values, before[key])]
    assert engine.step(batches(2), 3e-3, refuse_nothing).applied
    after = owned_values(engine)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, before)
    fill(engine, assemble(everyones), True, 1)
    engine.step(batches(2), 3e-3)
    again = owned_values(engine)
    same_again = all(np.array_equal(again[key], values) for key, values in after.items())
    return len(untouched) == len(before), {key[:2] for key in before}, after, same_again


ENGINES = [
    MEGATRON | {EP: 2},
    {**zero(3), EP: 2},
    pytest.param({"zero__stage": 0, EP: 2}, marks=pytest.mark.prove),
    pytest.param({"zero__stage": 1, TP: 2, PP: 2}, marks=pytest.mark.prove),
    *[pytest.param({**zero(stage), EP: 2}, marks=pytest.mark.prove) for stage in (0, 1, 2)],
    MEGATRON | MUON | {EP: 2},
    pytest.param({**zero(3), EP: 2, **MUON}, marks=pytest.mark.prove),
]


@pytest.mark.usefixtures("deepspeed_imported")
@pytest.mark.parametrize("keys", ENGINES, ids=name_of)
def test_a_refused_step_moves_nothing(keys: Keys) -> None:
    """Weights, moments and expert bias, bit for bit; and what follows is as if it had not been."""
    world = 4 if PP in keys else 2
    config = small_config(launch__processes_per_node=world, **keys, **BIASED)
    want = run_ranks(world, with_refused_steps, config, False)
    ranks = run_ranks(world, with_refused_steps, config, True)
    for got, other in zip(ranks, want, strict=True):
        assert got[0] and got[3], "untouched; and an earlier state is taken back in place"
        assert all(np.array_equal(got[2][key], values) for key, values in other[2].items())
    compared = {key for got in ranks for key in got[1]}
    kinds = {"weight", "exp_avg"} | ({"momentum"} if config.optimizer.kind == "muon" else set())
    assert any("expert_bias" in name for _, name in compared) and kinds <= {kind for kind, _ in compared}


# Whole attempts.


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> Path:
    """8 sequences a step; steps 1 to 4 read samples 0 to 31, saves after steps 2 and 4."""
    saves = {"checkpoint__interval_steps": 2, "checkpoint__keep": 0, "run__eval_batches": 0, "schedule__horizon_steps": 6}
    return write_config(tmp_path / "config.yaml", folder, 6, launch__processes_per_node=2, **{EP: 2}, **BIASED, **saves)


ROLLBACK = "divergence.nonfinite=rollback"
SKIP = "divergence.nonfinite=skip"


def attempt(config: Path, run_dir: Path, *words: str, bad: tuple[int, ...] = (), die_after: int = -1) -> list[int]:
    """Exit codes of an attempt in which the batches of the samples `bad` are spoiled; killed when step `die_after` is done."""
    return run_ranks(2, one_rank, ["--config", str(config), f"run.dir={run_dir}", *words], bad, die_after)


def one_rank(words: list[str], bad: tuple[int, ...], die_after: int) -> int:
    pretrain.training_data.micro_batches = spoiling(pretrain.training_data.micro_batches, bad)
    rate = pretrain.loop.learning_rate

    def dying(step: int, *args: Any) -> float:
        if step == die_after:
            os._exit(9)
        return rate(step, *args)

    pretrain.loop.learning_rate = dying
    return exit_code(words)


def passing_over(config: Path, run: Path, step: int, samples: int, *words: str) -> Path:
    """A run that begins at `run`'s checkpoint of `step`, and has never seen the samples from there to `samples`."""
    beside = run.with_name("passing_over")
    copied = beside / "checkpoints" / f"step_{step:07d}"
    shutil.copytree(run / "checkpoints" / copied.name, copied)
    path = copied / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"consumed_samples": samples}))
    assert attempt(config, beside, *words) == [0, 0]
    return beside


def told(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    skipped = ("time", "attempt", "kind")
    found = [row for _, row in iterate_lines(run_dir / "events.jsonl") if row is not None and row["kind"] == kind]
    return [{key: value for key, value in row.items() if key not in skipped} for row in found]


def manifest(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints" / f"step_{step:07d}" / "manifest.json").read_text())


def test_a_rollback_ends_as_the_run_that_never_saw_the_batches(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert attempt(config, run_dir, ROLLBACK, bad=(33,)) == [0, 0]
    want = passing_over(config, run_dir, 4, 40)
    assert same_checkpoint(run_dir, want)
    assert manifest(run_dir, 6)["consumed_samples"] == 56
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert [row["samples"] for row in rows(run_dir)] == [8, 16, 24, 32, 48, 56]
    rule = "loss inf and gradient norm nan must be finite"
    (rolled_back,) = told(run_dir, "rolled_back")
    assert {**rolled_back, "rule": "", "nonfinite": "", "grad_norm": ""} == {
        "from_step": 5, "to_step": 4, "consumed_samples": 40, "loss": None, "grad_norm": "", "rule": "", "nonfinite": "",
    }  # fmt: skip
    assert rolled_back["rule"].startswith(rule.split(" and ")[0]) and rolled_back["nonfinite"]["loss"] == "inf"
    assert "phalanx: rolled back: from_step 5, to_step 4" in capfd.readouterr().err
    cut = last_row(run_dir / "launch" / "attempt_0001" / "metrics_cut.jsonl")
    assert cut and cut["step"] == 5 and cut["applied"] is False, "the refused row is kept beside"
    # Killed after the rollback and before a save, then started again.
    killed = tmp_path / "killed"
    with pytest.raises(RankFailed, match="ended without an answer"):
        attempt(config, killed, ROLLBACK, bad=(33,), die_after=5)
    assert told(killed, "rolled_back") and not (killed / "checkpoints" / "step_0000006").exists()
    assert attempt(config, killed, ROLLBACK, bad=(33,)) == [0, 0]
    assert same_checkpoint(killed, want)
    assert len(told(killed, "rolled_back")) == 1 and rows(killed)[4]["samples"] == 48
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.prove
def test_a_second_rollback_goes_further_back_and_the_third_is_the_end(config: Path, tmp_path: Path) -> None:
    """Samples 33 (step 5, to 4), 41 (step 5 again, to 2), 57 (step 4, and 2 rollbacks are all)."""
    run_dir = tmp_path / "run"
    words = (ROLLBACK, "divergence.max_rollbacks=2", "checkpoint.asynchronous=false")
    assert attempt(config, run_dir, *words, bad=(33, 41, 57)) == [3, 3]
    assert [(row["to_step"], row["consumed_samples"]) for row in told(run_dir, "rolled_back")] == [(4, 40), (2, 48)]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_0000002", "step_0000004.rolled_back"]
    assert "divergence.max_rollbacks = 2 rollbacks were made already" in outcome(run_dir)["why"]
    assert outcome(run_dir)["state"] == "diverged" and told(run_dir, "diverged")[0]["step"] == 4
    # The bound holds over attempts, and what was passed over stays passed over.
    assert attempt(config, run_dir, *words, bad=(57,)) == [3, 3]
    assert [row["samples"] for row in rows(run_dir)] == [8, 16, 56, 64]
    assert attempt(config, run_dir, *words) == [0, 0]
    assert [row["samples"] for row in rows(run_dir)] == [8, 16, 56, 64, 72, 80]
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step_0000002", "step_0000004", "step_0000004.rolled_back", "step_0000006"], "keep=0 keeps all"


def test_a_skipped_step_counts_and_is_bounded_over_attempts(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (SKIP, "divergence.max_skips=2", "checkpoint.save_at_end=false")
    with pytest.raises(RankFailed, match="ended without an answer"):
        attempt(config, run_dir, *words, bad=(17, 25, 33), die_after=3)
    assert attempt(config, run_dir, *words, bad=(17, 25, 33)) == [3, 3]
    assert [row["step"] for row in told(run_dir, "skipped_step")] == [3, 3, 4], "step 3 was replayed, and counts once"
    assert "divergence.max_skips = 2 steps were skipped already" in told(run_dir, "diverged")[0]["rule"]
    found = rows(run_dir)
    assert [row["samples"] for row in found] == [8, 16, 24, 32, 40], "their batches are consumed"
    assert [row.get("skipped", False) for row in found] == [False, False, True, True, False]
    assert [row.get("applied", True) for row in found] == [True, True, False, False, False]
    assert found[2]["loss"] is None and found[2]["nonfinite"]["loss"] == "inf"
    assert manifest(run_dir, 4)["optimizer_steps"] == 2 and manifest(run_dir, 4)["step"] == 4


def test_by_default_it_stops_and_a_rollback_needs_a_checkpoint(config: Path, tmp_path: Path) -> None:
    assert attempt(config, tmp_path / "stop", bad=(9,)) == [3, 3]
    assert outcome(tmp_path / "stop")["why"].startswith("step 2 was not applied: loss inf and gradient norm ")
    assert "diverged" in events(tmp_path / "stop") and outcome(tmp_path / "stop")["step"] == 1
    assert attempt(config, tmp_path / "none", ROLLBACK, bad=(9,)) == [3, 3]
    assert "there is no earlier checkpoint to roll back to" in outcome(tmp_path / "none")["why"]
    assert "rolled_back" not in events(tmp_path / "none")


@pytest.mark.prove
@pytest.mark.usefixtures("deepspeed_imported")
@pytest.mark.parametrize(
    "words",
    [
        ("zero.engine=deepspeed", "zero.stage=0"),
        ("zero.engine=deepspeed", "zero.stage=1"),
        ("zero.engine=deepspeed", "zero.stage=2"),
        ("zero.engine=deepspeed", "zero.stage=3"),
        ("zero.engine=deepspeed", "zero.stage=3", "precision.params=bf16"),
        ("zero.stage=0",),
        ("zero.stage=1", "precision.params=bf16"),
        ("parallel.expert=1", "parallel.pipeline=2"),
        ("model.hidden_dropout=0.1",),
    ],
    ids=lambda words: "-".join(words),
)
def test_any_engine_rolls_back(config: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert attempt(config, tmp_path / "run", ROLLBACK, *words, bad=(33,)) == [0, 0]
    assert same_checkpoint(tmp_path / "run", passing_over(config, tmp_path / "run", 4, 40, *words))


@pytest.mark.prove
def test_spikes_are_judged_alike_after_a_kill(config: Path, tmp_path: Path) -> None:
    """A rule so strict that common noise breaks it; the killed run finds the window in the record."""
    strict = "divergence={spike: skip, spike_window_steps: 4, spike_min_steps: 4, spike_deviations: 0.01, spike_floor_nats: 1e-6}"
    words = (strict, "run.steps=10", "divergence.max_skips=9")
    assert attempt(config, tmp_path / "want", *words) == [0, 0]
    with pytest.raises(RankFailed, match="ended without an answer"):
        attempt(config, tmp_path / "killed", *words, die_after=7)
    assert attempt(config, tmp_path / "killed", *words) == [0, 0]
    skips = [row["step"] for row in rows(tmp_path / "want") if row.get("skipped")]
    assert skips and min(skips) > 4 and [row["step"] for row in rows(tmp_path / "killed") if row.get("skipped")] == skips
    assert same_checkpoint(tmp_path / "killed", tmp_path / "want", 10)
    assert "of 4 losses" in told(tmp_path / "want", "skipped_step")[0]["rule"]


@pytest.mark.prove
def test_wandb_has_each_step_once_after_a_rollback(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"
    assert attempt(config, run_dir, ROLLBACK, "metrics.sinks=[jsonl, wandb]", "run.steps=12", bad=(33,)) == [0, 0]
    found = offline_rows(run_dir, (run_dir / "wandb_id").read_text().strip())
    assert sorted(int(row["step"]) for row in found) == list(range(1, 13))


def test_a_copy_of_the_record_follows_it_through_a_rollback(tmp_path: Path) -> None:
    """What W&B is sent: after a rollback the rows from the first on, also where the file has grown past its old end meanwhile."""
    folder = RunFolder(tmp_path)
    record = Record.open(folder.metrics, 0, lambda *_, **__: None)
    follower, late = RecordFollower(folder.metrics), RecordFollower(folder.metrics, first_step=3)

    def write(step: int, loss: float) -> None:
        record.append({"step": step, "loss": loss, "grad_norm": 1.0, "tokens": step})

    def polled(one: RecordFollower) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in one.poll()]

    write(1, 1.0)
    write(2, 1.0)
    assert polled(follower) == [(1, 1.0), (2, 1.0)] and polled(follower) == [] and follower.replaced == 0
    end = RecordFollower(folder.metrics, from_end=True)
    write(3, 1.0)
    record.cut_back(1, tmp_path / "cut.jsonl")
    for step in (2, 3, 4):
        write(step, 2.0)
    assert polled(follower) == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)] and follower.replaced == 1
    write(5, 2.0)
    assert polled(follower) == [(5, 2.0)] and [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert polled(end) == [] and polled(late)[-1] == (5, 2.0)
    write(6, 2.0)
    assert polled(end) == [(6, 2.0)] == polled(late)
    record.close()
    unreadable = RecordFollower(tmp_path)
    with pytest.raises(IsADirectoryError):
        polled(unreadable)
