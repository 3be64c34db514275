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
from numpy.typing import NDArray

from tools.planner.job import Job
from tools.planner.work import INDEX, KINDS, Vector, stage_micro_work, step_work

FIT = Path(__file__).parent / "data" / "fit.json"
# Extra factors on kinds: products in fp8 and fp4 reach less of their peak, gradients that wait for the backward pass to
# end are not hidden, and PyTorch without fused kernels moves more bytes (the fsdp engine's published rows).
EXTRAS = ("gemm_fp8", "experts_fp8", "gemm_fp4", "data_not_overlapped", "memory_eager")
NAMES = (*KINDS, *EXTRAS)
# Which extra factor which kind takes, by number format.
NARROW = {
    "fp8": (("gemm", "gemm_fp8"), ("experts", "experts_fp8")),
    "fp4": (("gemm", "gemm_fp4"), ("experts", "gemm_fp4")),
}
# What runs beside the GPU's work: sharded weights that travel, and the host that launches kernels. The slowest decides,
# softly (norm of this power).
BESIDE = (("shards",), ("kernels", "expert_kernels"))
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
    for kind, name in NARROW.get(job.compute, ()):
        weights[INDEX[kind]] *= factors[NAMES.index(name)]
    if job.zero.engine == "fsdp":
        weights[INDEX["memory"]] *= factors[NAMES.index("memory_eager")]
    if not job.zero.overlap:
        weights[INDEX["data"]] = factors[NAMES.index("data_not_overlapped")]
    return weights


def combine(seconds: NDArray[np.float64]) -> Vector:
    """Total of [..., kind] seconds: one after another, but the groups of BESIDE beside all others."""
    beside = [seconds[..., [INDEX[name] for name in group]].sum(axis=-1) for group in BESIDE]
    rest = seconds.sum(axis=-1) - sum(beside)
    return (rest**OVERLAP_POWER + sum(part**OVERLAP_POWER for part in beside)) ** (1 / OVERLAP_POWER)


def shares(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each kind contributes to `combine`'s total, [..., kind], adding up to 1 (its derivative by each log)."""
    total, rest = combine(seconds), seconds.sum(axis=-1)
    stream = np.zeros_like(seconds)  # what runs one after another with a kind
    for group in BESIDE:
        members = [INDEX[name] for name in group]
        together = seconds[..., members].sum(axis=-1)
        stream[..., members] = together[..., None]
        rest = rest - together
    alone = [INDEX[name] for name in KINDS if not any(name in group for group in BESIDE)]
    stream[..., alone] = rest[..., None]
    return seconds * stream ** (OVERLAP_POWER - 1) / total[..., None] ** OVERLAP_POWER


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
    seconds = work * kind_factors(job, factors)
    total = scale * float(combine(seconds))
    parts = total * shares(seconds)
    # Of each kind, the part that the slowest stage doesn't do but waits for.
    idle = parts * np.divide(waiting, work, out=np.zeros_like(work), where=work > 0)
    breakdown = {name: float(value) for name, value in zip(KINDS, parts - idle) if value > 0}
    return Timing(total, float(idle.sum()) / total, breakdown | {"bubble": float(idle.sum())})
