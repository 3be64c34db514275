"""Step time from work: how far below the machine's speeds real runs stay.

In: a PlannedJob and fitted `factors` (data/fit.json: seconds really taken over seconds at full speed, per kind of work). Out:
a `Timing`. Stages wait for the slowest: m micro-batches of it, and the filling and draining over the others, divided by
the virtual chunks: m·t_max + (sum t - t_max)/vpp (Narayanan et al., arXiv 2104.04473, for uneven stages).

Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.memory.job import PlannedJob
from tools.planner.step_cost import INDEX, KINDS, Vector, stage_micro_work
from tools.planner.update_cost import step_work

FIT = Path(__file__).parent / "data" / "fit.json"


@dataclass(frozen=True)
class ExtraFactor:
    """A further factor on `kinds` for the jobs that it applies to, or one in place of theirs (`replaces`)."""

    name: str
    kinds: tuple[str, ...]
    applies: Callable[[PlannedJob], bool]
    replaces: bool = False


# Gradients that wait for the backward pass to end, and tensor parallel traffic that products wait for, are not hidden. PyTorch
# without fused kernels moves more bytes. The first flash attention of a GPU reaches about half of what later ones do: on A100
# 25 to 40% of the peak (arXiv 2307.08691), on H100 35% (arXiv 2407.08608). Kernels of torch.compile read columns slowly when
# they cast for one product at a time (pytorch/ao issue 1788).
EXTRA_FACTORS = (
    ExtraFactor("expert_kernels_fp8", ("expert_kernels",), lambda job: job.compute in ("fp8", "fp4"), replaces=True),
    ExtraFactor("data_not_overlapped", ("data",), lambda job: not job.zero.overlap, replaces=True),
    ExtraFactor("tensor_not_overlapped", ("tensor",), lambda job: job.tensor_waits, replaces=True),
    ExtraFactor("experts_overlapped", ("expert_near", "expert_far"), lambda job: job.hides_experts),
    ExtraFactor("casts_apart", ("casts",), lambda job: job.casts_apart, replaces=True),
    ExtraFactor("memory_eager", ("memory",), lambda job: job.eager),
    ExtraFactor("attention_flash_1", ("attention",), lambda job: job.early_flash and not job.machine.gpu.has_fp8),
    ExtraFactor("attention_flash_2", ("attention",), lambda job: job.early_flash and job.machine.gpu.has_fp8),
)
NAMES = (*KINDS, *(extra.name for extra in EXTRA_FACTORS))
# What runs beside the GPU's work: sharded weights that travel, and the host that launches kernels. The slowest decides,
# softly (norm of this power).
BESIDE = (("shards",), ("kernels", "expert_kernels"))
OVERLAP_POWER = 2.5


@cache
def fitted() -> Vector:
    """The factors shipped with the code, over NAMES."""
    table = json.loads(FIT.read_text(encoding="utf-8"))["factors"]
    return np.array([float(table[name]) for name in NAMES])


def step_vector(job: PlannedJob, factors: Vector) -> tuple[Vector, Vector]:
    """(work of the critical path over NAMES' kinds, the part of it that is waiting in the pipeline)."""
    micro, once = stage_micro_work(job), step_work(job)
    weights = kind_factors(job, factors)
    per_stage = micro @ weights
    slowest = int(np.argmax(per_stage * job.num_micro_batches + once @ weights))
    waiting = (micro.sum(axis=0) - micro[slowest]) / job.layout.virtual_pipeline
    return job.num_micro_batches * micro[slowest] + waiting + once[slowest], waiting


def applies(job: PlannedJob) -> NDArray[np.bool_]:
    """Which of EXTRAS a job takes, [extra]."""
    return np.array([extra.applies(job) for extra in EXTRA_FACTORS])


def kind_weights(extras: NDArray[np.bool_], factors: Vector) -> NDArray[np.float64]:
    """The factor of each kind for jobs that take these extras: [..., extra] → [..., kind]."""
    weights = np.broadcast_to(factors[: len(KINDS)], (*extras.shape[:-1], len(KINDS))).copy()
    for number, extra in enumerate(EXTRA_FACTORS):
        taken = extras[..., number]
        if not taken.any():
            continue
        factor = factors[len(KINDS) + number]
        for kind in extra.kinds:
            column = weights[..., INDEX[kind]]
            weights[..., INDEX[kind]] = np.where(taken, factor if extra.replaces else factor * column, column)
    return weights


def kind_factors(job: PlannedJob, factors: Vector) -> Vector:
    """The factor of each kind for this job: `kind_weights` of one, made thousands of times in a search."""
    weights = factors[: len(KINDS)].copy()
    for number, extra in enumerate(EXTRA_FACTORS):
        if extra.applies(job):
            for kind in extra.kinds:
                weights[INDEX[kind]] = factors[len(KINDS) + number] * (1.0 if extra.replaces else weights[INDEX[kind]])
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


def time_step(job: PlannedJob, factors: Vector | None = None, scale: float = 1.0) -> Timing:
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
