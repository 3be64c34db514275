"""Step time from work: how far below the machine's speeds real runs stay. [p]

In: a Job and fitted `factors` (data/fit.json: seconds really taken over seconds at full speed, per kind of work). Out:
a `Timing`. Stages wait for the slowest: m micro-batches of it, and the filling and draining over the others, divided by
the virtual chunks: m·t_max + (sum t - t_max)/vpp (Narayanan et al., arXiv 2104.04473, for uneven stages).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tools.planner.job import Job
from tools.planner.work import INDEX, KINDS, Vector, stage_micro_work, step_work

FIT = Path(__file__).parent / "data" / "fit.json"
# Extra factors on kinds: products in fp8 and fp4 reach less of their peak, gradients that wait for the backward pass to
# end are not hidden.
EXTRAS = ("gemm_fp8", "gemm_fp4", "data_not_overlapped")
NAMES = (*KINDS, *EXTRAS)
# Sharded weights travel while the layers before compute: the slower of both, softly (norm of this power).
OVERLAP_POWER = 4.0


@cache
def fitted() -> Vector:
    """The factors shipped with the code, over NAMES."""
    table = json.loads(FIT.read_text(encoding="utf-8"))["factors"]
    return np.array([float(table[name]) for name in NAMES])


def step_vector(job: Job, factors: Vector) -> tuple[Vector, Vector]:
    """(work of the critical path over NAMES' kinds, the part of it that is waiting in the pipeline)."""
    micro, once = stage_micro_work(job), step_work(job)
    weights = kind_factors(job, factors)
    per_stage = micro @ weights
    slowest = int(np.argmax(per_stage * job.num_micro_batches + once @ weights))
    waiting = (micro.sum(axis=0) - micro[slowest]) / job.layout.virtual_pipeline
    return job.num_micro_batches * micro[slowest] + waiting + once[slowest], waiting


def kind_factors(job: Job, factors: Vector) -> Vector:
    """The factor of each kind for this job's number format and overlap."""
    weights = factors[: len(KINDS)].copy()
    for name in ("fp8", "fp4"):
        if job.compute == name:
            weights[[INDEX["gemm"], INDEX["experts"]]] *= factors[NAMES.index(f"gemm_{name}")]
    if not job.zero.overlap:
        weights[INDEX["data"]] = factors[NAMES.index("data_not_overlapped")]
    return weights


def combine(seconds: Vector) -> Vector:
    """Total of [..., kind] seconds: everything after one another, but sharded weights beside the computation."""
    shards = seconds[..., INDEX["shards"]]
    rest = seconds.sum(axis=-1) - shards
    return (rest**OVERLAP_POWER + shards**OVERLAP_POWER) ** (1 / OVERLAP_POWER)


@dataclass(frozen=True)
class Timing:
    """A step. `breakdown_s` adds up to step_s; bubble is the share of the step that the slowest stage waits."""

    step_s: float
    bubble_fraction: float
    breakdown_s: dict[str, float]


def time_step(job: Job, factors: Vector | None = None, scale: float = 1.0) -> Timing:
    """The time of a step. `scale`: the user's own machine over ours (calibration)."""
    factors = fitted() if factors is None else factors
    work, waiting = step_vector(job, factors)
    weights = kind_factors(job, factors)
    seconds = work * weights
    total = float(combine(seconds))
    waits = float(waiting @ weights)
    parts = {name: float(value) for name, value in zip(KINDS, (work - waiting) * weights) if value > 0}
    parts["bubble"] = waits
    hidden = sum(parts.values()) - total
    if "shards" in parts:
        parts["shards"] = max(0.0, parts["shards"] - hidden)
    return Timing(scale * total, waits / total, {name: scale * value for name, value in parts.items()})
