"""The learning rate as a pure function of the step. In: step, sections `optimizer` and `schedule`, horizon. Out: a number.

Steps count from 0, the first update. A warm-up of W steps gives peak·(step+1)/W, so step 0 is above 0 and step W-1 is at the
peak. Afterwards the rate is min + (peak - min)·shape(p), where the progress p goes from 0 at the start of the decay to 1 at the
horizon. The shapes are linear 1-p, cosine (1+cos πp)/2 and sqrt 1-√p. `wsd` stays at the peak and decays over its last steps
(arXiv 2404.06395). From the horizon on the rate is min_lr. `constant` never decays.

Torch-free.
"""

from __future__ import annotations

import math

from configs.schema import Optimizer, Schedule


def decay_steps(schedule: Schedule, horizon_steps: int) -> int:
    """The length of the decay in steps. For wsd the default is a tenth of the horizon, and at least one step."""
    if schedule.kind == "wsd":
        return schedule.decay_steps or max(horizon_steps // 10, 1)
    return 0 if schedule.kind == "constant" else horizon_steps - schedule.warmup_steps


def _shape(kind: str, progress: float) -> float:
    if kind == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - math.sqrt(progress) if kind == "sqrt" else 1 - progress


def learning_rate(step: int, optimizer: Optimizer, schedule: Schedule, horizon_steps: int) -> float:
    """The learning rate of update number `step`, counted from 0."""
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
