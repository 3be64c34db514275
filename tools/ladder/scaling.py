"""The scaling law of a finished ladder. In: parameters, tokens and final loss of each run. Out: the fit with its intervals.

L(N, D) = E + A / N^alpha + B / D^beta, fitted as Hoffmann et al. (arXiv 2203.15556, section 3.3 and appendix D.3): the Huber
loss (delta 1e-3) of log L, from a grid of starts. Where all runs have the same tokens per parameter, N and D can't be
told apart: there L(C) = E + A / C^alpha with C = 6 N D.

Intervals are the 10th and 90th percentile over resampled runs. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, least_squares
from scipy.special import logsumexp

HUBER_DELTA = 1e-3
RESAMPLES = 100
PERCENTILES = (10, 90)
FORMS = {"chinchilla": "L = E + A / N^alpha + B / D^beta", "compute": "L = E + A / C^alpha with C = 6 N D"}
_LARGEST_EXPONENT = 5.0
# A fit has that many more runs than unknowns at least.
_SPARE_RUNS = 1
# Tokens per parameter that differ by less than this factor are the same.
_SAME_RATIO = 1.3


@dataclass(frozen=True)
class Observation:
    """One finished run. `parameters`: those active for a token, embeddings included. `loss` in nats a token."""

    point: str
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """`form` is chinchilla or compute. `values` holds E and, for each term, its factor and exponent; `intervals` their ranges.

    `error`: the largest relative difference between a run's loss and the fit. `drawn`: the values fitted to resampled runs.
    """

    form: str
    values: dict[str, float]
    drawn: tuple[dict[str, float], ...]
    error: float

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 10th and 90th percentile of each value over the resampled runs."""
        return {name: _percentiles([found[name] for found in self.drawn]) for name in self.values}

    def loss(self, parameters: float, tokens: float) -> float:
        """The predicted loss, in nats a token."""
        return _loss(self.values, self.form, parameters, tokens)

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """The 10th and 90th percentile of the predicted loss over the resampled runs."""
        return _percentiles([_loss(found, self.form, parameters, tokens) for found in self.drawn])

    def as_dict(self) -> dict[str, Any]:
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return {"form": self.form, "values": self.values, "intervals_p10_p90": intervals, "largest_rel_error": self.error}


def _loss(values: dict[str, float], form: str, parameters: float, tokens: float) -> float:
    if form == "chinchilla":
        return values["E"] + values["A"] / parameters ** values["alpha"] + values["B"] / tokens ** values["beta"]
    return values["E"] + values["A"] / (6 * parameters * tokens) ** values["alpha"]


def _percentiles(found: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(found, PERCENTILES)
    return float(low), float(high)


def best_of_each(observations: Sequence[Observation]) -> list[Observation]:
    """Of the runs with the same parameters and tokens the one with the lowest loss: the others were tuned worse."""
    best: dict[tuple[float, float], Observation] = {}
    for found in observations:
        key = (found.parameters, found.tokens)
        if key not in best or found.loss < best[key].loss:
            best[key] = found
    return list(best.values())


def fit(observations: Sequence[Observation], seed: int = 0) -> ScalingLaw | str:
    """The law of these runs, or why there is none."""
    runs = best_of_each(observations)
    ratios = [run.tokens / run.parameters for run in runs]
    same = not ratios or max(ratios) / min(ratios) < _SAME_RATIO
    form = "compute" if same else "chinchilla"
    features = _features(runs, form)
    unknowns = 1 + 2 * features.shape[1]
    if len(runs) < unknowns + _SPARE_RUNS:
        return f"a fit of {unknowns} unknowns takes at least {unknowns + _SPARE_RUNS} sizes; finished are {len(runs)}"
    names = ("N", "D") if form == "chinchilla" else ("C",)
    for column, name in enumerate(names):
        if (distinct := len(np.unique(features[:, column]))) < 3:
            return f"a fit takes at least 3 values of {name}; finished runs have {distinct}"
    target = np.log([run.loss for run in runs])
    solution = _solve(features, target, _starts(features, target))
    values = _named_values(solution, form)
    predicted = _predict(solution, features)
    error = float(np.max(np.abs(np.expm1(predicted - target))))
    return ScalingLaw(form, values, _resampled(features, target, solution, form, seed), error)


def _features(runs: Sequence[Observation], form: str) -> np.ndarray:
    """Logarithms of what the terms are powers of, [runs, terms]."""
    if form == "chinchilla":
        return np.log([[run.parameters, run.tokens] for run in runs])
    return np.log([[6 * run.parameters * run.tokens] for run in runs]).reshape(-1, 1)


def _predict(solution: np.ndarray, features: np.ndarray) -> np.ndarray:
    """log L of each run. `solution`: log E, then (log factor, exponent) of each term."""
    terms = solution[1::2] - solution[2::2] * features
    return _log_of_sum(np.column_stack([np.full(len(features), solution[0]), terms]))


def _log_of_sum(terms: np.ndarray) -> np.ndarray:
    """log of the sum of exp of each row, [runs]."""
    return np.asarray(logsumexp(terms, axis=1))


def _slopes(solution: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The derivative of log L by each unknown, [runs, unknowns]."""
    terms = np.column_stack([np.full(len(features), solution[0]), solution[1::2] - solution[2::2] * features])
    shares = np.exp(terms - _log_of_sum(terms)[:, None])
    slopes = np.empty((len(features), len(solution)))
    slopes[:, 0] = shares[:, 0]
    slopes[:, 1::2] = shares[:, 1:]
    slopes[:, 2::2] = -shares[:, 1:] * features
    return slopes


def _starts(features: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    """A grid of starts: E as a share of the lowest loss, exponents around published ones, factors that fit the middle."""
    lowest, middle = float(target.min()), features.mean(axis=0)
    found = []
    for share, exponents in product((0.3, 0.6, 0.9), product((0.1, 0.3, 0.6), repeat=features.shape[1])):
        rest = np.log(max(np.exp(np.median(target)) - share * np.exp(lowest), 1e-6) / features.shape[1])
        terms = [value for column, exponent in enumerate(exponents) for value in (rest + exponent * middle[column], exponent)]
        found.append(np.array([np.log(share) + lowest, *terms]))
    return found


def _solve(features: np.ndarray, target: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
    unknowns = 1 + 2 * features.shape[1]
    low, high = np.full(unknowns, -np.inf), np.full(unknowns, np.inf)
    low[2::2], high[2::2] = 0.0, _LARGEST_EXPONENT

    # scipy's annotations know the names of methods for `jac` only.
    solver: Any = least_squares

    def solve(start: np.ndarray) -> OptimizeResult:
        return solver(
            lambda solution: _predict(solution, features) - target,
            start,
            lambda solution: _slopes(solution, features),
            (low, high),
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            ftol=1e-8,
            xtol=1e-8,
            gtol=1e-14,
        )

    return min((solve(start) for start in starts), key=lambda result: result.cost).x


def _named_values(solution: np.ndarray, form: str) -> dict[str, float]:
    found = {"E": float(np.exp(solution[0])), "A": float(np.exp(solution[1])), "alpha": float(solution[2])}
    if form == "chinchilla":
        found |= {"B": float(np.exp(solution[3])), "beta": float(solution[4])}
        # Of a budget of compute C = 6 N D, the best N grows as C to this power (equation 4 of the paper).
        found["optimal_n_exponent"] = found["beta"] / max(found["alpha"] + found["beta"], 1e-12)
    return found


def _resampled(
    features: np.ndarray, target: np.ndarray, solution: np.ndarray, form: str, seed: int
) -> tuple[dict[str, float], ...]:
    """The values fitted to each of RESAMPLES draws of the runs, with replacement."""
    random = np.random.default_rng(seed)
    drawn: list[dict[str, float]] = []
    while len(drawn) < RESAMPLES:
        chosen = random.integers(len(target), size=len(target))
        # A sample with fewer values of N or D than a curve has unknowns says nothing about it.
        if min(len(np.unique(features[chosen, column])) for column in range(features.shape[1])) < 3:
            continue
        drawn.append(_named_values(_solve(features[chosen], target[chosen], [solution]), form))
    return tuple(drawn)


def law_text(law: ScalingLaw | str) -> str:
    """The law in lines, or the line that says why there is none."""
    if isinstance(law, str):
        return f"scaling law: {law}"
    lines = [f"scaling law: {FORMS[law.form]}, off by {law.error:.2%} at most"]
    intervals = law.intervals
    for name, value in law.values.items():
        low, high = intervals[name]
        lines.append(f"  {name:<18}  {value:.4g}  ({low:.4g} to {high:.4g} in 80% of resampled runs)")
    return "\n".join(lines)
