"""Fits the factors of timing.py on published rows, and measures errors on rows that the fit did not see. [p]

In: runs with measured speed. Out: factors, predictions. `python -m tools.planner.fit ROWS.json` writes data/fit.json.
Method: least squares of log(predicted / measured step time) over log(factor), softened for outliers (soft L1), rows
weighted so that a group (source, model, GPU) counts as n^0.75 of its n rows, drawn to the physical prior where the rows
say little. numpy only; a fit takes about a second.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.planner.job import Job
from tools.planner.published import Run, runs_of
from tools.planner.timing import FIT, NAMES, NARROW, combine, shares, step_vector
from tools.planner.work import INDEX, KINDS, Vector

# Seconds taken over seconds at full speed that one expects before looking: the largest products are the unit.
PRIOR: dict[str, float] = {
    "gemm": 1.1,
    "experts": 1.3,
    "attention": 1.6,
    "memory": 1.3,
    "casts": 1.3,
    "scores": 1.3,
    "tensor": 1.3,
    "expert_near": 1.5,
    "expert_far": 1.5,
    "context": 0.5,
    "pipeline": 1.0,
    "passes": 2e-04,
    "data": 0.5,
    "shards": 1.4,
    "optimizer": 1.5,
    "kernels": 4e-06,
    "expert_kernels": 0.0002,
    "steps": 0.02,
    "gemm_fp8": 1.1,
    "experts_fp8": 1.3,
    "gemm_fp4": 1.3,
    "data_not_overlapped": 1.3,
    "memory_eager": 1.5,
}
# Standard deviation of a log factor around its prior, and of a row's log error.
PRIOR_WIDTH, ROW_WIDTH = 0.7, 0.1
# Flash attention's efficiency is known better than the rows can tell it from the products'.
WIDTHS: dict[str, float] = {"attention": 0.2}
STEPS = 12


@dataclass(frozen=True)
class Design:
    """Rows as arrays: work [row, kind], which extra factors apply, and measured step seconds."""

    work: NDArray[np.float64]
    fp8: NDArray[np.bool_]
    fp4: NDArray[np.bool_]
    waits: NDArray[np.bool_]
    eager: NDArray[np.bool_]
    measured_s: Vector

    def part(self, rows: NDArray[np.bool_]) -> Design:
        """Some of the rows."""
        return Design(*(getattr(self, item.name)[rows] for item in fields(self)))

    def seconds(self, factors: Vector) -> NDArray[np.float64]:
        """Seconds of each row and kind."""
        weights = np.tile(factors[: len(KINDS)], (len(self.work), 1))
        for compute, pairs in NARROW.items():
            for kind, name in pairs:
                weights[getattr(self, compute), INDEX[kind]] *= factors[NAMES.index(name)]
        weights[self.eager, INDEX["memory"]] *= factors[NAMES.index("memory_eager")]
        weights[self.waits, INDEX["data"]] = factors[NAMES.index("data_not_overlapped")]
        return self.work * weights

    def log_error(self, factors: Vector) -> tuple[Vector, NDArray[np.float64]]:
        """log(predicted / measured), and its derivative by each log factor, [row, name]."""
        seconds = self.seconds(factors)
        share = np.zeros((len(seconds), len(NAMES)))
        share[:, : len(KINDS)] = shares(seconds)
        for compute, pairs in NARROW.items():
            for kind, name in pairs:
                share[:, NAMES.index(name)] += share[:, INDEX[kind]] * getattr(self, compute)
        share[:, NAMES.index("data_not_overlapped")] = share[:, INDEX["data"]] * self.waits
        share[self.waits, INDEX["data"]] = 0.0
        share[:, NAMES.index("memory_eager")] = share[:, INDEX["memory"]] * self.eager
        return np.log(combine(seconds) / self.measured_s), share


def step_seconds(run: Run) -> float:
    """The measured step time."""
    assert run.tokens_per_s, f"{run.id} has no speed: runs_of leaves it out"
    return run.job.step_tokens / run.tokens_per_s / run.job.layout.world_size


def make_design(runs: Sequence[Run], factors: Vector) -> Design:
    """The rows under the stages that are slowest with `factors`."""
    jobs: list[Job] = [run.job for run in runs]
    return Design(
        work=np.array([step_vector(job, factors)[0] for job in jobs]),
        fp8=np.array([job.compute == "fp8" for job in jobs]),
        fp4=np.array([job.compute == "fp4" for job in jobs]),
        waits=np.array([not job.zero.overlap for job in jobs]),
        eager=np.array([job.zero.engine == "fsdp" for job in jobs]),
        measured_s=np.array([step_seconds(run) for run in runs]),
    )


def row_weights(runs: Sequence[Run]) -> Vector:
    """A group of n rows counts as n^0.75 rows: more than one, less than its size."""
    sizes: dict[str, int] = {}
    for run in runs:
        sizes[run.group] = sizes.get(run.group, 0) + 1
    return np.array([sizes[run.group] ** -0.25 for run in runs])


def prior() -> Vector:
    return np.array([PRIOR[name] for name in NAMES])


def solve(design: Design, weights: Vector) -> Vector:
    """Factors by Gauss-Newton with the soft-L1 loss, started from the prior."""
    center = np.log(prior())
    widths = np.array([WIDTHS.get(name, PRIOR_WIDTH) for name in NAMES])
    logs = center.copy()
    for _ in range(STEPS):
        error, slope = design.log_error(np.exp(logs))
        soft = weights / np.sqrt(1 + (error / ROW_WIDTH) ** 2) / ROW_WIDTH**2
        left = slope.T @ (soft[:, None] * slope) + np.diag(widths**-2)
        right = -slope.T @ (soft * error) - (logs - center) / widths**2
        logs = logs + np.clip(np.linalg.solve(left, right), -0.5, 0.5)
    return np.exp(logs)


def fit(runs: Sequence[Run]) -> Vector:
    """Factors of these runs. The slowest stage depends on the factors, so the work is made again once."""
    factors = prior()
    for _ in range(2):
        factors = solve(make_design(runs, factors), row_weights(runs))
    return factors


def held_out_errors(runs: Sequence[Run], key: Callable[[Run], str], folds: int | None = None) -> Vector:
    """log(predicted / measured step time) of each run by a fit that saw none of its group.

    `key` names the group; `folds`: groups are dealt into so many folds (largest first, in turn); None: one at a time.
    """
    names: dict[str, int] = {}
    for run in runs:
        names[key(run)] = names.get(key(run), 0) + 1
    order = sorted(names, key=lambda name: (-names[name], name))
    fold = {name: position % (folds or len(order)) for position, name in enumerate(order)}
    chosen = np.array([fold[key(run)] for run in runs])
    design, weights = make_design(runs, fit(runs)), row_weights(runs)
    errors = np.zeros(len(runs))
    for number in range(max(fold.values()) + 1):
        seen, unseen = chosen != number, chosen == number
        errors[unseen] = design.part(unseen).log_error(solve(design.part(seen), weights[seen]))[0]
    return errors


def write(path: Path, factors: Vector, num_rows: int) -> None:
    """fit.json, written beside and renamed."""
    note = "seconds taken over seconds at full speed, by kind of work (tools/planner/work.py); made by tools/planner/fit.py"
    document = {"note": note, "rows": num_rows, "factors": {name: float(f"{value:.4g}") for name, value in zip(NAMES, factors)}}
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def main(argv: list[str]) -> int:
    """Fit on every comparable row of the files named and write data/fit.json."""
    rows = [row for name in argv for row in json.loads(Path(name).read_text(encoding="utf-8"))]
    runs = [run for run in runs_of(rows, "time")[0] if run.apart is None]
    write(FIT, fit(runs), len(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
