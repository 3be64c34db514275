"""What a ladder takes before it runs. In: its configs. Out: the plan of each point and the sum, as text or plain data.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from configs.load import Loaded
from configs.schema import Config
from configs.units import count
from parallel.memory.job import make_job
from pretrain.data.tokenizer import vocab_size
from tools.ladder.ladder_file import Point, merged, named
from tools.planner.calibrate import calibrate
from tools.planner.duration import Failures, RunEstimate, estimate_run
from tools.planner.legal import plan_problems
from tools.planner.planning import UNCALIBRATED, Plan, make_plan, model_dict
from tools.text_table import table


@dataclass(frozen=True)
class Price:
    """The plan of one point. `parameters`: all of them, and those active for a token, embeddings included."""

    point: Point
    plan: Plan
    run: RunEstimate
    parameters: int
    active: int

    def as_dict(self) -> dict[str, Any]:
        size = {"params_total": self.parameters, "params_active": self.active, "gpus": self.plan.job.layout.world_size}
        return (
            {"point": self.point.name, "words": list(self.point.words)} | size | self.plan.as_dict() | {"run": self.run.as_dict()}
        )


def price(loaded: Sequence[tuple[Point, Loaded]], calibrate_by: str | None = None) -> list[Price]:
    """The price of each point. Raises ConfigError with the problems of all of them. `calibrate_by`: a measured run's folder."""
    prices, problems = [], []
    for point, found in loaded:
        try:
            prices.append(_price(point, found.config, calibrate_by))
        except ConfigError as error:
            problems += named(point, error.problems)
    if problems:
        raise ConfigError(merged(problems))
    return prices


def _price(point: Point, config: Config, calibrate_by: str | None) -> Price:
    if problems := plan_problems(config):
        raise ConfigError(problems)
    job = make_job(config, vocab_size(config))
    plan = make_plan(job, calibrate(calibrate_by, config) if calibrate_by else UNCALIBRATED)
    run = estimate_run(config, job, plan.timing.step_s, Failures())
    model: dict[str, Any] = model_dict(job)
    return Price(point, plan, run, model["params_total"], model["params_active"]["all"])


def total(prices: Sequence[Price]) -> dict[str, Any]:
    """The sums over the points. The cost is None if one point has none."""
    costs = [price.run.cost_usd for price in prices]
    known = [cost for cost in costs if cost is not None]
    return {
        "points": len(prices),
        "tokens": sum(price.run.tokens for price in prices),
        "gpu_hours": sum(price.run.gpu_hours for price in prices),
        "cost_usd": sum(known) if len(known) == len(costs) else None,
        "all_fit": all(price.plan.fits for price in prices),
    }


def bill_text(prices: Sequence[Price]) -> str:
    """A line for each point, then the sum."""
    header = ("point", "parameters", "active", "tokens", "steps", "GPUs", "step s", "days", "GPU-hours", "cost", "GiB", "fits")
    rows = [
        [price.point.name, count(price.parameters), count(price.active), count(price.run.tokens), f"{price.run.steps:,}",
         str(price.plan.job.layout.world_size), f"{price.plan.timing.step_s:.3g}", f"{price.run.days:.3g}",
         f"{price.run.gpu_hours:,.3g}", _dollars(price.run.cost_usd), f"{price.plan.ledger.peak_gib:.1f}",
         "yes" if price.plan.fits else "NO"]
        for price in prices
    ]  # fmt: skip
    found = total(prices)
    hours, cost = f"{found['gpu_hours']:,.4g} GPU-hours", _dollars(found["cost_usd"])
    return f"{table(header, rows)}\n{len(prices)} points: {count(found['tokens'])} tokens, {hours}{', ' + cost if cost else ''}"


def _dollars(cost: float | None) -> str:
    return "" if cost is None else f"${cost:,.0f}"
