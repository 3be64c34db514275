"""The rule for steps that may not be applied: what it refuses, what it counts, and that a resume knows what it knew."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Divergence
from pretrain.checkpoint.manifest import FORMAT, Manifest
from pretrain.checkpoint.rollback import Rollback, begin_rollback, choose_targets, drop_passed, finish_rollback, move_aside
from pretrain.divergence import ACCEPT, ROLLBACK, SKIP, STOP, DivergencePolicy, History, RefusedStep, StepDecision, read_history
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.folder import COMPLETE, RunFolder, step_folder
from pretrain.run.record_rows import encode_row

NAN, INF = math.nan, math.inf


def section(**values: Any) -> Divergence:
    return Divergence(**{"spike_min_steps": 4, "spike_window_steps": 8, **values})


def actions(policy: DivergencePolicy, losses: list[float]) -> list[str]:
    return [policy.judge(loss, 1.0).action for loss in losses]


# The rule.


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (5.0, NAN), (5.0, INF), (-INF, NAN)])
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_what_is_no_number_is_refused_as_configured(loss: float, norm: float, action: str) -> None:
    decision = DivergencePolicy(section(nonfinite=action), History()).judge(loss, norm)
    assert decision == StepDecision(action, f"loss {loss:g} and gradient norm {norm:g} must be finite")


def test_spikes_are_off_by_default() -> None:
    assert set(actions(DivergencePolicy(Divergence(), History()), [5.0] * 100 + [500.0])) == {ACCEPT}
    assert DivergencePolicy(Divergence(), History()).judge(NAN, 1.0).action == STOP


def test_a_spike_says_its_numbers() -> None:
    policy = DivergencePolicy(section(spike="skip", spike_deviations=2.0), History((5.0, 5.2, 4.8, 5.1, 4.9)))
    decision = policy.judge(6.0, 1.0)
    assert decision.action == SKIP
    assert decision.rule == (
        "loss 6.0000 must be at most 5.2965: median 5.0000 of 5 losses + 2 x 1.4826 x MAD 0.1 = 0.2965, at least 0.2"
    )
    assert policy.judge(5.29, 1.0).action == ACCEPT


def test_a_constant_window_has_a_floor_and_a_short_window_detects_no_spike() -> None:
    policy = DivergencePolicy(section(spike="stop", spike_floor_nats=0.5), History())
    assert actions(policy, [5.0, 5.0, 9.0, 5.0]) == [ACCEPT] * 4, "fewer than 4 losses are known"
    assert actions(policy, [5.5, 5.51]) == [ACCEPT, STOP]


def test_a_refused_loss_does_not_move_the_window() -> None:
    policy = DivergencePolicy(section(spike="skip", max_skips=50), History())
    assert actions(policy, [5.0] * 8 + [7.0] * 40 + [5.0]) == [ACCEPT] * 8 + [SKIP] * 40 + [ACCEPT]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1, 10), min_size=8, max_size=8), st.floats(0, 20), st.floats(-5, 5), st.randoms(use_true_random=False))
def test_the_limit_ignores_the_order_of_losses_and_shifts_with_them(
    losses: list[float], loss: float, shift: float, order: random.Random
) -> None:
    def limit(window: list[float]) -> float:
        rule = DivergencePolicy(section(spike="stop"), History(tuple(window))).judge(1e6, 1.0).rule
        return float(rule.split("at most ")[1].split(":")[0])

    shuffled = order.sample(losses, len(losses))
    assert limit(shuffled) == limit(losses) >= sorted(losses)[3] + 0.19
    assert limit([one + shift for one in losses]) == pytest.approx(limit(losses) + shift, abs=2e-3)
    policy = DivergencePolicy(section(spike="stop"), History(tuple(losses)))
    if abs(loss - limit(losses)) > 1e-3:
        assert (policy.judge(loss, 1.0).action == STOP) == (loss > limit(losses))


def test_a_falling_noisy_loss_is_no_spike_and_one_jump_is() -> None:
    draw = random.Random(3)
    losses = [8.0 / (1 + step / 50) + draw.gauss(0, 0.05) for step in range(400)]
    policy = DivergencePolicy(Divergence(spike="skip"), History())
    assert set(actions(policy, losses)) == {ACCEPT}
    assert actions(policy, [losses[-1] + 0.6, losses[-1]]) == [SKIP, ACCEPT]


# Bounds.


def test_bounds_end_the_run_and_say_so() -> None:
    policy = DivergencePolicy(section(nonfinite="skip", max_skips=2), History(skips=1))
    assert policy.judge(NAN, 1.0).action == SKIP
    last = policy.judge(NAN, 1.0)
    assert last.action == STOP and "divergence.max_skips = 2 steps were skipped already" in last.rule
    policy = DivergencePolicy(section(nonfinite="rollback", max_rollbacks=1), History(rollbacks=1))
    last = policy.judge(NAN, 1.0)
    assert last.action == STOP and "divergence.max_rollbacks = 1 rollbacks were made already" in last.rule


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([4.9, 5.0, 5.05, 5.1, 9.0, NAN]), min_size=1, max_size=30), st.data())
def test_a_resume_decides_as_the_run_that_was_killed(losses: list[float], data: st.DataObject) -> None:
    """From any step of any run of skips: its record and its events (also those ahead of the step) make the same policy."""
    rule = section(nonfinite="skip", spike="skip", max_skips=5)
    policy, rows, events, decisions = DivergencePolicy(rule, History()), [], [], []
    for step, loss in enumerate(losses, start=1):
        decisions.append(policy.judge(loss, 1.0))
        row = {"step": step, "loss": loss, "grad_norm": 1.0, "samples": 8 * step}
        rows.append(row | ({} if decisions[-1].action == ACCEPT else {"applied": False}))
        if decisions[-1].action == SKIP:
            events.append({"kind": EventKind.SKIPPED_STEP, **RefusedStep.of(row, decisions[-1]).as_fields()})
    for _ in range(2):
        at = data.draw(st.integers(0, len(losses)))
        resumed = DivergencePolicy(rule, read_history(rule, rows[:at][::-1], events, 8 * at))
        again = [resumed.judge(loss, 1.0) for loss in losses[at:]]
        assert again == decisions[at:]
        # The replay says its skips again.
        events += [event for event in events if event["samples"] > 8 * at]


# Where a rollback goes.


def checkpoint(folder: Path, step: int, samples: int) -> Path:
    """What rollback reads of a checkpoint."""
    made = step_folder(folder, step)
    made.mkdir(parents=True)
    values: dict[str, Any] = dict.fromkeys(Manifest.__dataclass_fields__) | {
        "format": FORMAT,
        "step": step,
        "consumed_samples": samples,
    }
    manifest = Manifest(**values | {"kinds": (), "files": {}, "model": {}})
    (made / "manifest.json").write_text(manifest.as_json())
    (made / COMPLETE).touch()
    return made


def steps(folders: list[Path]) -> list[str]:
    return [folder.name.removeprefix("step_").lstrip("0") for folder in folders]


def test_which_checkpoints_a_rollback_may_take(tmp_path: Path) -> None:
    assert choose_targets(tmp_path, 9, 1, None) == []
    for step in (3, 6, 9):
        checkpoint(tmp_path, step, 8 * step)
    assert steps(choose_targets(tmp_path, 10, 1, None)) == ["9", "6", "3"]
    assert steps(choose_targets(tmp_path, 8, 1, None)) == ["6", "3"], "what is newer than the refused step is none"
    assert steps(choose_targets(tmp_path, 10, 2, None)) == ["6", "3"]
    assert steps(choose_targets(tmp_path, 10, 9, None)) == ["3"], "the oldest is as far as it goes"
    assert steps(choose_targets(tmp_path, 10, 1, Rollback(9, 80))) == ["6", "3"], "once more without a save: further back"
    assert steps(choose_targets(tmp_path, 10, 1, Rollback(6, 80))) == ["9", "6", "3"], "saved since"
    assert steps(choose_targets(tmp_path, 4, 1, Rollback(3, 80))) == ["3"], "there is none further back"


class Events:
    """A run folder's events, written as rank 0 does."""

    def __init__(self, folder: RunFolder) -> None:
        folder.checkpoints.mkdir(parents=True)
        append_event(folder, 1, EventKind.ATTEMPT, wandb_id="", logs=None, slurm_job=None)
        self.kinds: list[str] = []

        def say(kind: EventKind, **fields: Any) -> None:
            append_event(folder, 1, kind, **encode_row(fields))
            self.kinds.append(kind)

        self.say = say


class Killed(BaseException):
    """What no code of ours catches."""


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def test_a_kill_in_the_middle_of_a_rollback_is_made_good(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    events, refused = Events(folder), RefusedStep(8, 64, NAN, 1.0, "why")
    for step in (3, 6):
        checkpoint(folder.checkpoints, step, 8 * step)
    assert finish_rollback(folder, events.say) == 0, "no events, nothing to do"
    rule = section(rollback_checkpoints=2)

    def killed(kind: EventKind, **fields: Any) -> None:
        events.say(kind, **fields)
        raise Killed

    with pytest.raises(Killed):
        begin_rollback(folder, rule, refused, killed)
    assert names(folder) == ["step_0000003", "step_0000006"], "only the event was written"
    assert finish_rollback(folder, events.say) == 64
    assert names(folder) == ["step_0000003", "step_0000006.rolled_back"]
    assert events.kinds == ["rolled_back", "checkpoint_rolled_back"]
    # From here on the run saves what it went on to: that stays.
    checkpoint(folder.checkpoints, 6, 8 * (8 + 3))
    assert finish_rollback(folder, events.say) == 64
    assert names(folder) == ["step_0000003", "step_0000006", "step_0000006.rolled_back"]
    assert [path.name for path in drop_passed(folder.checkpoints, 6, None)] == ["step_0000006.rolled_back"]


def test_nothing_to_go_back_to_changes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    events = Events(folder)
    assert begin_rollback(folder, section(), RefusedStep(3, 24, 9.0, 1.0, "why"), events.say) == []
    assert events.kinds == []


def test_what_was_set_aside_goes_when_a_save_has_passed_it(tmp_path: Path) -> None:
    for step in (4, 6, 8):
        move_aside(checkpoint(tmp_path, step, 8 * step), "rolled_back")
    move_aside(checkpoint(tmp_path, 6, 50), "rolled_back")
    assert [path.name for path in drop_passed(tmp_path, 7, 4)] == ["step_0000006.rolled_back", "step_0000006.rolled_back2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000004.rolled_back", "step_0000008.rolled_back"]


def test_a_rollback_is_an_action_of_its_own() -> None:
    policy = DivergencePolicy(section(spike="rollback", max_rollbacks=2), History((5.0,) * 8))
    assert actions(policy, [9.0, 9.0, 9.0]) == [ROLLBACK, ROLLBACK, STOP]
