"""The decision whether a step may be applied: the rules for a loss or gradient norm that is not finite, and for a loss spike.

In: the `divergence` section, the run's history, and each step's loss and gradient norm. Out: a `StepDecision` with the numbers
of the broken rule. A decision depends on these arguments alone, so ranks with equal numbers decide alike. A run that is killed
and resumed decides as if it had not been killed, because `read_history` restores the history from the record and the events.

The spike rule compares a loss with the median of a window, in units of the MAD (median absolute deviation). For normal noise,
1.4826 MAD is the standard deviation. A few outliers change neither median nor MAD, and refused steps never enter the window. A
falling loss is below its median, so only a jump breaks the rule. A loss that has risen for good is refused at every step until
the bound on skips or rollbacks ends the run.

Torch-free.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from configs.schema import Divergence
from pretrain.run.events import EventKind

ACCEPT, SKIP, ROLLBACK, STOP = "accept", "skip", "rollback", "stop"

# Standard deviations of normal noise in one MAD.
MAD_SCALE = 1.4826


@dataclass(frozen=True)
class StepDecision:
    """The action for a step. `rule`: the broken rule with its numbers, in one line; empty for an accepted step."""

    action: str
    rule: str = ""


@dataclass(frozen=True)
class RefusedStep:
    """A step that was not applied. `samples`: consumed samples since the run began, the batch of this step included."""

    step: int
    samples: int
    loss: float
    grad_norm: float
    rule: str

    @classmethod
    def of(cls, row: dict[str, Any], decision: StepDecision) -> RefusedStep:
        """The refused step of this row of the record. `decision`: the decision that refused it."""
        return cls(row["step"], row["samples"], row["loss"], row["grad_norm"], decision.rule)

    def as_fields(self) -> dict[str, Any]:
        """The fields of an event."""
        return asdict(self)


@dataclass(frozen=True)
class History:
    """A run's history: losses of its last applied steps, oldest first, and the numbers of skips and rollbacks."""

    losses: tuple[float, ...] = ()
    skips: int = 0
    rollbacks: int = 0


def read_history(
    section: Divergence, rows: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]], consumed_samples: int
) -> History:
    """The history of a run. `rows`: the decoded record up to its step, newest first. `consumed_samples`: up to that step.

    A skipped step is identified by its consumed samples, so it counts once although a resume that repeats it writes its event
    again. Events beyond `consumed_samples` are not counted. The spike rule takes so many rows as its window has.
    """
    losses: list[float] = []
    if section.spike != "off":
        applied = (row["loss"] for row in rows if row.get("applied", True) and _is_finite(row.get("loss")))
        losses = list(islice(applied, section.spike_window_steps))[::-1]
    skipped, rollbacks = set(), 0
    for event in events:
        if event.get("kind") == EventKind.SKIPPED_STEP and event["samples"] <= consumed_samples:
            skipped.add(event["samples"])
        rollbacks += event.get("kind") == EventKind.ROLLED_BACK
    return History(tuple(losses), len(skipped), rollbacks)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


class DivergencePolicy:
    """Judges the steps of a run in their order. Call `judge` once a step: it updates the window and the counts."""

    def __init__(self, section: Divergence, history: History) -> None:
        self._section = section
        self._losses: deque[float] = deque(history.losses, maxlen=section.spike_window_steps)
        self._skips = history.skips
        self._rollbacks = history.rollbacks

    def judge(self, loss: float, grad_norm: float) -> StepDecision:
        """The decision on a step. `loss` is in nats a token, `grad_norm` is the norm before clipping."""
        decision = self._decide(loss, grad_norm)
        if decision.action == ACCEPT:
            self._losses.append(loss)
        self._skips += decision.action == SKIP
        self._rollbacks += decision.action == ROLLBACK
        return decision

    def _decide(self, loss: float, grad_norm: float) -> StepDecision:
        section = self._section
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._bounded(section.nonfinite, f"loss {loss:g} and gradient norm {grad_norm:g} must be finite")
        if section.spike != "off" and (rule := self._spike(loss)):
            return self._bounded(section.spike, rule)
        return StepDecision(ACCEPT)

    def _spike(self, loss: float) -> str | None:
        """The spike rule with its numbers. None: the loss doesn't break it."""
        section, losses = self._section, self._losses
        if len(losses) < section.spike_min_steps:
            return None
        median = statistics.median(losses)
        mad = statistics.median(abs(one - median) for one in losses)
        deviation = section.spike_deviations * MAD_SCALE * mad
        limit = median + max(deviation, section.spike_floor_nats)
        if loss <= limit:
            return None
        allowed = (
            f"{section.spike_deviations:g} x {MAD_SCALE} x MAD {mad:.4g} = {deviation:.4g}, at least {section.spike_floor_nats:g}"
        )
        return f"loss {loss:.4f} must be at most {limit:.4f}: median {median:.4f} of {len(losses)} losses + {allowed}"

    def _bounded(self, action: str, rule: str) -> StepDecision:
        section = self._section
        if action == SKIP and self._skips >= section.max_skips:
            return StepDecision(STOP, f"{rule}; divergence.max_skips = {section.max_skips} steps were skipped already")
        if action == ROLLBACK and self._rollbacks >= section.max_rollbacks:
            return StepDecision(STOP, f"{rule}; divergence.max_rollbacks = {section.max_rollbacks} rollbacks were made already")
        return StepDecision(action, rule)
