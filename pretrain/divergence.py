"""Whether a step may be applied: the rule for a loss or gradient that is no number, and for a loss that jumps.

In: the `divergence` section, what the run has been through, and each step's loss and gradient norm. Out: a `StepDecision`
with the numbers of its rule. Nothing but its arguments is read, so ranks with equal numbers decide alike, and a run that
is killed and resumed decides as if it had not been: `read_history` finds in the record and the events what the policy
knew at that step.

The spike rule is robust: median and MAD (median absolute deviation, times 1.4826 a standard deviation of normal noise)
don't move with a few outliers, and refused steps never enter the window. A falling loss lies below its median, so it
takes a jump to fire; a loss that has risen for good is refused again and again until the bound ends the run.

Torch-free.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from configs.schema import Divergence
from pretrain.run.events import EventKind

ACCEPT, SKIP, ROLLBACK, STOP = "accept", "skip", "rollback", "stop"

# Standard deviations of normal noise in one MAD.
MAD_SCALE = 1.4826


@dataclass(frozen=True)
class StepDecision:
    """The action for a step. `rule`: the broken rule with its numbers, one line; empty for an accepted step."""

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
        """Made from the step's row of the record and the decision on it."""
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
    """`rows`: the record up to the step that the run stands at, decoded. `consumed_samples`: where it stands in the data.

    A skipped step is known by its place in the data: a resume that replays it says so again, and it counts once. What lies
    ahead of `consumed_samples` is not counted yet. Costs one pass over the rows when the spike rule is on.
    """
    losses: deque[float] = deque(maxlen=section.spike_window_steps)
    if section.spike != "off":
        losses.extend(row["loss"] for row in rows if row.get("applied", True) and math.isfinite(row["loss"]))
    skipped, rollbacks = set(), 0
    for event in events:
        if event.get("kind") == EventKind.SKIPPED_STEP and event["samples"] <= consumed_samples:
            skipped.add(event["samples"])
        rollbacks += event.get("kind") == EventKind.ROLLED_BACK
    return History(tuple(losses), len(skipped), rollbacks)


class DivergencePolicy:
    """Judges one step after the other. `judge`, called once a step, adds an accepted loss to the window and counts a skip."""

    def __init__(self, section: Divergence, history: History) -> None:
        self._section = section
        self._losses: deque[float] = deque(history.losses, maxlen=section.spike_window_steps)
        self._skips = history.skips
        self._rollbacks = history.rollbacks

    def judge(self, loss: float, grad_norm: float) -> StepDecision:
        """The decision on the step with this loss (nats a token) and gradient norm (before clipping)."""
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
        """The spike rule with its numbers when the loss breaks it; else None."""
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
