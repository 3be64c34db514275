"""The learning rate as a pure function of the step. In: step, sections `optimizer` and `schedule`, horizon. Out: a number.

Steps count from 0, the first update. Warm-up of W steps: peak·(step+1)/W, so no update is wasted at 0 and step W-1 has
the peak. After it, with progress p from 0 at the start of the decay to 1 at the horizon, min + (peak - min)·shape(p):
linear 1-p; cosine (1+cos πp)/2; sqrt 1-√p. `wsd` stays at the peak and decays over its last steps (arXiv 2404.06395).
From the horizon on it is min_lr; `constant` never decays.

Torch-free.
"""

from __future__ import annotations

import math

from configs.schema import Optimizer, Schedule


def decay_steps(schedule: Schedule, horizon_steps: int) -> int:
    """Length of the decay in steps; of wsd a tenth of the horizon (at least one step) unless given."""
    if schedule.kind == "wsd":
        return schedule.decay_steps or max(horizon_steps // 10, 1)
    return 0 if schedule.kind == "constant" else horizon_steps - schedule.warmup_steps


def _shape(kind: str, progress: float) -> float:
    if kind == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - math.sqrt(progress) if kind == "sqrt" else 1 - progress


def learning_rate(step: int, optimizer: Optimizer, schedule: Schedule, horizon_steps: int) -> float:
    """The learning rate of update `step` (from 0)."""
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return optimizer.lr
    if step >= horizon_steps:
        return schedule.min_lr
    length = decay_steps(schedule, horizon_steps)
    progress = max(0.0, (step - (horizon_steps - length)) / length)
    shape = schedule.decay_shape if schedule.kind == "wsd" else schedule.kind
    return schedule.min_lr + (optimizer.lr - schedule.min_lr) * _shape(shape, progress)
