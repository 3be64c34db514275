"""A ladder on the page: its points, and the scaling law as a picture. In: a `Ladder`. Out: JSON values.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from configs.load import Loaded
from tools.ladder.bill import Price, price
from tools.ladder.ladder_file import Ladder, Point
from tools.ladder.observe import law_of
from tools.ladder.scaling import FORMS, Observation, ScalingLaw, best_of_each
from tools.ladder.state import PointState, read_states
from tools.report.collect import rank_hours

# The curve goes on to so many times the compute of the largest run.
_BEYOND = 10
_CURVE_POINTS = 60
# The page draws so many runs; the table has all.
MOST_RUNS = 64


class LadderReader:
    """Reads one ladder, again and again. The plans are made once; so is the law, when all points have finished."""

    def __init__(self, ladder: Ladder) -> None:
        """Raises ConfigError when a point can't be loaded or planned."""
        self.ladder = ladder
        self._loaded = ladder.load()
        self._prices = price(self._loaded)
        self._law: dict[str, Any] | None = None
        self.states: list[PointState] = []

    def read(self) -> dict[str, Any]:
        """The ladder's document. Raises ConfigError when a run's folder can't be read."""
        self.states = read_states(self.ladder)
        rows = zip(self.states, self._loaded, self._prices, strict=True)
        points = [_point(*row) for row in rows]
        if self._law is None or not self._law["final"]:
            self._law = _law(self.ladder, self.states)
        return {"name": self.ladder.name, "path": str(self.ladder.folder), "points": points, "law": self._law}

    def begun(self) -> list[Point]:
        """The points that a launch has reached, at most MOST_RUNS of them."""
        return [state.point for state in self.states if state.begun][:MOST_RUNS]


def _point(state: PointState, loaded: tuple[Point, Loaded], planned: Price) -> dict[str, Any]:
    status = state.status
    return {
        "point": state.point.name,
        "words": list(state.point.words),
        "state": status.state,
        "step": status.step,
        "steps": planned.run.steps,
        "loss": status.loss,
        "val_loss": status.val_loss,
        "parameters": planned.parameters,
        "active": planned.active,
        "tokens": planned.run.tokens,
        "planned_hours": planned.run.gpu_hours,
        "planned_usd": planned.run.cost_usd,
        "hours": rank_hours(loaded[1].config.launch, status),
    }


def _law(ladder: Ladder, states: Sequence[PointState]) -> dict[str, Any]:
    """`final`: no later look can give another one."""
    law, observations = law_of(ladder, states)
    if isinstance(law, str):
        return {"why": law, "final": bool(observations), "runs": [_run(one, None) for one in observations]}
    intervals = law.intervals
    return {
        "final": True,
        "form": FORMS[law.form],
        "error": law.error,
        "values": [[name, value, *intervals[name]] for name, value in law.values.items()],
        "runs": [_run(one, law) for one in observations],
        "curve": _curve(law, best_of_each(observations)),
    }


def _run(one: Observation, law: ScalingLaw | None) -> dict[str, Any]:
    return asdict(one) | {"compute": 6 * one.parameters * one.tokens, "fitted": law and law.loss(one.parameters, one.tokens)}


def _curve(law: ScalingLaw, runs: Sequence[Observation]) -> dict[str, Any]:
    """Loss by compute C = 6 N D, at the median of the runs' tokens per parameter, with the range of the resampled runs."""
    ratio = float(np.median([run.tokens / run.parameters for run in runs]))
    compute = [6 * run.parameters * run.tokens for run in runs]
    places = np.geomspace(min(compute), _BEYOND * max(compute), _CURVE_POINTS)
    sizes = np.sqrt(places / 6 / ratio)
    found = [(law.loss(size, ratio * size), *law.interval(size, ratio * size)) for size in sizes]
    columns = zip(("loss", "low", "high"), zip(*found, strict=True), strict=True)
    return {"tokens_per_parameter": ratio, "compute": places.tolist(), "largest": max(compute)} | {
        name: list(values) for name, values in columns
    }
