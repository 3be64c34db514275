"""The scaling law of a finished ladder. In: parameters, tokens and final loss of each run. Out: the fit with its intervals.

L(N, D) = E + A / N^alpha + B / D^beta, fitted as Hoffmann et al. (arXiv 2203.15556, section 3.3 and appendix D.3): the Huber
loss (delta 1e-3) of log L, by L-BFGS from a grid of starts. Where all runs have the same tokens per parameter, N and D can't be
told apart: there L(C) = E + A / C^alpha with C = 6 N D.

Intervals are the 10th and 90th percentile over resampled runs. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

HUBER_DELTA = 1e-3
RESAMPLES = 100
PERCENTILES = (10, 90)
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

    `error`: the largest relative difference between a run's loss and the fit.
    """

    form: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    error: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The predicted loss, in nats a token."""
        found = self.values
        if self.form == "chinchilla":
            return found["E"] + found["A"] / parameters ** found["alpha"] + found["B"] / tokens ** found["beta"]
        return found["E"] + found["A"] / (6 * parameters * tokens) ** found["alpha"]

    def as_dict(self) -> dict[str, Any]:
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return {"form": self.form, "values": self.values, "intervals_p10_p90": intervals, "largest_rel_error": self.error}


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
    return ScalingLaw(form, values, _intervals(features, target, solution, form, seed), error)


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


def _objective(solution: np.ndarray, features: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """The Huber loss and its gradient."""
    terms = np.column_stack([np.full(len(features), solution[0]), solution[1::2] - solution[2::2] * features])
    predicted = _log_of_sum(terms)
    shares = np.exp(terms - predicted[:, None])
    residual = predicted - target
    slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
    gradient = np.empty_like(solution)
    gradient[0] = slope @ shares[:, 0]
    gradient[1::2] = slope @ shares[:, 1:]
    gradient[2::2] = -(slope[:, None] * shares[:, 1:] * features).sum(axis=0)
    # In units of delta squared, so that the solver's tolerances mean something.
    return float(huber(HUBER_DELTA, residual).sum()) / HUBER_DELTA**2, gradient / HUBER_DELTA**2


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
    bounds = [(None, None)] + [(None, None), (0.0, 5.0)] * features.shape[1]
    options = {"maxiter": 5000, "ftol": 1e-13, "gtol": 1e-9}
    results = [
        minimize(_objective, start, (features, target), method="L-BFGS-B", jac=True, bounds=bounds, options=options)
        for start in starts
    ]
    return min(results, key=lambda result: result.fun).x


def _named_values(solution: np.ndarray, form: str) -> dict[str, float]:
    found = {"E": float(np.exp(solution[0])), "A": float(np.exp(solution[1])), "alpha": float(solution[2])}
    if form == "chinchilla":
        found |= {"B": float(np.exp(solution[3])), "beta": float(solution[4])}
        # Of a budget of compute C = 6 N D, the best N grows as C to this power (equation 4 of the paper).
        found["optimal_n_exponent"] = found["beta"] / max(found["alpha"] + found["beta"], 1e-12)
    return found


def _intervals(
    features: np.ndarray, target: np.ndarray, solution: np.ndarray, form: str, seed: int
) -> dict[str, tuple[float, float]]:
    random = np.random.default_rng(seed)
    drawn: list[dict[str, float]] = []
    while len(drawn) < RESAMPLES:
        chosen = random.integers(len(target), size=len(target))
        # A sample with fewer values of N or D than a curve has unknowns says nothing about it.
        if min(len(np.unique(features[chosen, column])) for column in range(features.shape[1])) < 3:
            continue
        drawn.append(_named_values(_solve(features[chosen], target[chosen], [solution]), form))
    bounds = {name: np.percentile([found[name] for found in drawn], PERCENTILES) for name in drawn[0]}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
