"""The learning rate's shape: ends, continuity, and independence of where the run stops."""

from __future__ import annotations

import math

import pytest

from configs.schema import Optimizer, Schedule
from pretrain.schedule import learning_rate

OPTIMIZER = Optimizer(lr=2.0)


def rates(schedule: Schedule, horizon: int, steps: int | None = None) -> list[float]:
    return [learning_rate(step, OPTIMIZER, schedule, horizon) for step in range(steps or horizon)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_evenly_to_the_peak(kind: str) -> None:
    got = rates(Schedule(kind=kind, warmup_steps=4), 40, 5)
    assert got == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_falls_from_the_peak_to_the_minimum_and_stays(kind: str) -> None:
    schedule = Schedule(kind=kind, warmup_steps=3, min_lr=0.2, decay_steps=10 if kind == "wsd" else None)
    got = rates(schedule, 40, 60)
    assert got[3:] == sorted(got[3:], reverse=True)
    assert got[3] == 2.0 and got[39] > 0.2 and got[40:] == [0.2] * 20


def test_decay_at_half_the_horizon() -> None:
    assert learning_rate(10, OPTIMIZER, Schedule(kind="linear", min_lr=1.0), 20) == 1.5
    assert learning_rate(10, OPTIMIZER, Schedule(kind="cosine"), 20) == pytest.approx(1.0)
    assert learning_rate(5, OPTIMIZER, Schedule(kind="cosine"), 20) == pytest.approx(1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(("shape", "half"), [("linear", 1.0), ("cosine", 1.0), ("sqrt", 2 * (1 - math.sqrt(0.5)))])
def test_wsd_is_flat_then_decays(shape: str, half: float) -> None:
    schedule = Schedule(kind="wsd", decay_steps=10, decay_shape=shape)
    got = rates(schedule, 40)
    assert got[:31] == [2.0] * 31 and got[35] == pytest.approx(half)


def test_wsd_decays_over_a_tenth_unless_stated() -> None:
    got = rates(Schedule(kind="wsd"), 50)
    assert got[45] == 2.0 and got[46] < 2.0
    assert rates(Schedule(kind="wsd"), 5)[-1] == 2.0


def test_constant_never_decays() -> None:
    assert rates(Schedule(kind="constant", min_lr=0.1), 10, 30) == [2.0] * 30
