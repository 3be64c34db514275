"""Fits the factors of timing.py on published rows.

In: runs with measured speed. Out: factors, predictions. `python -m tools.planner.published.fit ROWS.json` writes data/fit.json.
Method: least squares of log(predicted / measured step time) over log(factor), softened for outliers (soft L1), rows
weighted so that a group (source, model, GPU) counts as n^0.75 of its n rows, drawn to the physical prior where the rows
say little. numpy only; a fit takes about a second.

Torch-free.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.run.files import write_atomically
from tools.planner.published.rows import PublishedRun, runs_to_fit
from tools.planner.step_cost import INDEX, KINDS, Vector
from tools.planner.timing import EXTRA_FACTORS, FIT, NAMES, applies, combine, kind_weights, shares, step_vector

# Seconds taken over seconds at full speed that one expects before looking: the largest products are the unit.
PRIOR: dict[str, float] = {
    "gemm": 1.1,
    "gemm_fp8": 1.2,
    "experts": 1.3,
    "experts_fp8": 1.7,
    "products_fp4": 1.4,
    # The largest products reach some 80% of the peak, flash attention 3 some 60% forward and backward (arXiv 2407.08608).
    "attention": 1.4,
    "exponentials": 0.7,
    "memory": 1.3,
    "operands": 0.8,
    "casts": 1.3,
    "scores": 1.3,
    "tensor": 1.3,
    "expert_near": 1.5,
    "expert_far": 1.5,
    "context": 0.5,
    "pipeline": 1.0,
    "passes": 2e-04,
    "data": 1.0,
    # What NCCL's kernels take from those beside them.
    "data_beside": 0.2,
    "shards": 1.4,
    "optimizer": 1.5,
    "gaps": 3e-6,
    "kernels": 4e-06,
    # Six products of some 10 us of the host's time each.
    "expert_kernels": 6e-05,
    "steps": 0.02,
    # A Transformer Engine linear in fp8 keeps the host for about 1 ms a forward and backward pass (its issues 445, 761); an
    # expert has two, and shares much of it with the others of its group.
    "expert_kernels_fp8": 0.0005,
    "data_not_overlapped": 1.3,
    "tensor_not_overlapped": 1.3,
    "experts_overlapped": 0.5,
    # Llama-3-8B on 8 H100 of 96 GB makes 7,186 tokens/s with one scale a tensor, 6,412 with one a row (torchtitan 7a04053).
    "casts_apart": 4.0,
    "memory_eager": 1.5,
    "attention_flash_1": 1.9,
    "attention_flash_2": 1.65,
}
# Standard deviation of a log factor around its prior, and of a row's log error.
PRIOR_WIDTH, ROW_WIDTH = 0.7, 0.1
# Known better than the rows can tell: flash attention's efficiency from the products'; what is left of the tokens' way where it
# is overlapped (about half: Megatron-Bridge's Qwen3-30B on 16 H100 takes 24.7 s without, 21.0 s with); gathered weights, which
# rings of NCCL send at some 70 to 90% of the network's speed.
WIDTHS: dict[str, float] = {"attention": 0.4, "experts_overlapped": 0.15, "shards": 0.25, "casts_apart": 0.4}
STEPS = 12


@dataclass(frozen=True)
class FitData:
    """Rows as arrays: work [row, kind], which extra factors apply [row, extra], and measured step seconds."""

    work: NDArray[np.float64]
    extras: NDArray[np.bool_]
    measured_s: Vector

    def part(self, rows: NDArray[np.bool_]) -> FitData:
        """Some of the rows."""
        return FitData(self.work[rows], self.extras[rows], self.measured_s[rows])

    def log_error(self, factors: Vector) -> tuple[Vector, NDArray[np.float64]]:
        """log(predicted / measured), and its derivative by each log factor, [row, name]."""
        seconds = self.work * kind_weights(self.extras, factors)
        by_kind = shares(seconds)
        slope = np.zeros((len(seconds), len(NAMES)))
        for number, extra in enumerate(EXTRA_FACTORS):
            columns = [INDEX[kind] for kind in extra.kinds]
            taken = self.extras[:, number]
            slope[:, len(KINDS) + number] = by_kind[:, columns].sum(axis=1) * taken
            if extra.replaces:
                by_kind[:, columns] *= ~taken[:, None]
        slope[:, : len(KINDS)] = by_kind
        return np.log(combine(seconds) / self.measured_s), slope


def step_seconds(run: PublishedRun) -> float:
    """The measured step time."""
    assert run.tokens_per_s, f"{run.id} has no speed: runs_of leaves it out"
    return run.job.step_tokens / run.tokens_per_s / run.job.layout.world_size


def make_design(runs: Sequence[PublishedRun], factors: Vector) -> FitData:
    """The rows under the stages that are slowest with `factors`."""
    return FitData(
        work=np.array([step_vector(run.job, factors)[0] for run in runs]),
        extras=np.array([applies(run.job) for run in runs]),
        measured_s=np.array([step_seconds(run) for run in runs]),
    )


def row_weights(runs: Sequence[PublishedRun]) -> Vector:
    """A group of n rows counts as n^0.75 rows: more than one, less than its size."""
    sizes: dict[str, int] = {}
    for run in runs:
        sizes[run.group] = sizes.get(run.group, 0) + 1
    return np.array([sizes[run.group] ** -0.25 for run in runs])


def prior() -> Vector:
    return np.array([PRIOR[name] for name in NAMES])


def solve(design: FitData, weights: Vector) -> Vector:
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


def fit(runs: Sequence[PublishedRun]) -> Vector:
    """Factors of these runs. The slowest stage depends on the factors, so the work is made again once."""
    factors = prior()
    for _ in range(2):
        factors = solve(make_design(runs, factors), row_weights(runs))
    return factors


def write(path: Path, factors: Vector, num_rows: int) -> None:
    """Write fit.json. Raises OSError."""
    note = "seconds taken over seconds at full speed, by kind of work (step_cost.py); made by published/fit.py"
    document = {"note": note, "rows": num_rows, "factors": {name: float(f"{value:.4g}") for name, value in zip(NAMES, factors)}}
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Fit on every comparable row of the files named that is not kept out, and write data/fit.json."""
    rows = [row for name in argv for row in json.loads(Path(name).read_text(encoding="utf-8"))]
    runs = runs_to_fit(rows)
    write(FIT, fit(runs), len(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
