"""Predicted against published: `phalanx plan-validate`.

In: rows. Out: errors of tokens/s and memory, by source. A row whose group (source, model, GPU) the shipped fit has seen is
predicted by a fit made without that group, and once more without its whole source; rows of elsewhere, and rows that are kept
out, by the shipped fit.

Torch-free.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.flops import training_flops
from parallel.memory.hardware import GIB
from parallel.memory.ledger import IMBALANCE_HIGH, VERDICTS, MemoryLedger, make_ledger
from tools.planner.published.fit import FitData, make_design, row_weights, solve
from tools.planner.published.row import RECOMPUTE_LADDER
from tools.planner.published.rows import PublishedRun, runs_of, runs_to_fit
from tools.planner.step_cost import Vector
from tools.planner.timing import fitted

ROWS = Path(__file__).resolve().parents[1] / "data" / "published_runs.json"
# BLOOM's figures are nvidia-smi's, which stood 17 GB above what torch had allocated (data/README.md).
SMI_ABOVE_ALLOCATED_GB = 17.0
# What the allocator reserves over what it hands out.
RESERVED_OVER_ALLOCATED = 1.05


@cache
def shipped_runs() -> tuple[PublishedRun, ...]:
    """The rows that the shipped factors were fitted on."""
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    return tuple(runs_to_fit(rows))


@cache
def _shipped_design() -> tuple[FitData, Vector]:
    runs = shipped_runs()
    return make_design(runs, fitted()), row_weights(runs)


def unseen_errors(runs: Sequence[PublishedRun], key: Callable[[PublishedRun], str]) -> Vector:
    """log(predicted / measured step time) of each run by factors fitted without the rows of its `key`; of a run that was kept
    out, by the shipped factors."""
    shipped = np.array([key(run) for run in shipped_runs()])
    names = np.array(["" if run.kept_out else key(run) for run in runs])
    design = make_design(runs, fitted())
    errors = np.zeros(len(runs))
    for name in sorted(set(names)):
        factors = fitted()
        if name in shipped:
            known, weights = _shipped_design()
            factors = solve(known.part(shipped != name), weights[shipped != name])
        chosen = names == name
        errors[chosen] = design.part(chosen).log_error(factors)[0]
    return errors


def statistics(errors: Vector, runs: Sequence[PublishedRun], with_sources: bool = True) -> dict[str, Any]:
    """Median, 90th percentile and share within 20% of |predicted / measured - 1|."""
    if not len(errors):
        return {"rows": 0, "median_abs_rel_err": None, "p90_abs_rel_err": None, "within_20pct": None}
    size = np.abs(errors)
    found: dict[str, Any] = {
        "rows": len(size),
        "median_abs_rel_err": round(float(np.median(size)), 4),
        "p90_abs_rel_err": round(float(np.percentile(size, 90)), 4),
        "within_20pct": round(float(np.mean(size <= 0.2)), 4),
    }
    if with_sources:
        moe = np.array([run.is_moe for run in runs])
        for name, chosen in (("dense", ~moe), ("moe", moe)):
            found[name] = statistics(errors[chosen], [], False)
        sources = np.array([run.source for run in runs])
        found["by_source"] = {
            name: statistics(errors[sources == name], [], False) for name in sorted({run.source for run in runs})
        }
    return found


def constant_mfu_errors(runs: Sequence[PublishedRun]) -> Vector:
    """The error of assuming one MFU for all: the median MFU of the shipped rows, of the peak of the number format."""

    def mfu(run: PublishedRun) -> float:
        job = run.job
        flops = training_flops(job.model, job.vocab, job.seq_length).per_token
        return float(run.tokens_per_s or 0.0) * flops / (job.machine.gpu.peak_tflops(job.compute) * 1e12)

    usual = float(np.median([mfu(run) for run in shipped_runs()]))
    return np.array([usual / mfu(run) - 1 for run in runs])


def calibrated_errors(runs: Sequence[PublishedRun], errors: Vector) -> NDArray[np.float64]:
    """Relative errors after one calibration run on the same machine (source and GPU): the most alike other run's error is
    taken off. Runs without another on their machine are NaN."""
    result = np.full(len(runs), np.nan)
    machines: dict[tuple[str, str], list[int]] = {}
    for index, run in enumerate(runs):
        machines.setdefault((run.source, run.job.machine.gpu.name), []).append(index)
    for members in machines.values():
        for index in members:
            others = [other for other in members if other != index]
            if others:
                nearest = min(others, key=lambda other: (_distance(runs[index], runs[other]), other))
                result[index] = np.exp(-(errors[index] - errors[nearest])) - 1
    return result


def _distance(one: PublishedRun, other: PublishedRun) -> float:
    a, b = one.job, other.job
    unlike = (a.model.name != b.model.name) + 2 * (a.compute != b.compute) + (a.recompute != b.recompute) * 0.5
    ratios = ((a.layout.world_size, b.layout.world_size), (a.micro_batch, b.micro_batch), (a.seq_length, b.seq_length),
              (a.layout.tensor, b.layout.tensor), (a.layout.pipeline, b.layout.pipeline))  # fmt: skip
    return unlike + sum(abs(float(np.log2(x / y))) for x, y in ratios) / 10


def memory_gb(run: PublishedRun, ledger: MemoryLedger) -> float:
    """The prediction in the row's own terms, 1e9 bytes. Megatron's CI reports its last stage."""
    rank = ledger.ranks[-1] if run.source == "Megatron-LM CI" else max(ledger.ranks, key=lambda rank: rank.allocated_gib)
    allocated = rank.allocated_gib * GIB / 1e9
    if run.memory_kind == "used":
        return allocated + SMI_ABOVE_ALLOCATED_GB
    return allocated * (RESERVED_OVER_ALLOCATED if run.memory_kind == "reserved" else 1.0)


def imbalance_of(run: PublishedRun) -> float:
    """Benchmarks force their routers into balance; Megatron's CI trains its own from scratch, and reports the maximum."""
    return IMBALANCE_HIGH if run.source == "Megatron-LM CI" else 1.0


def memory_errors(runs: Sequence[PublishedRun]) -> Vector:
    ledgers = [make_ledger(run.job, imbalance_of(run)) for run in runs]
    return np.array([memory_gb(run, ledger) / (run.memory_gb or np.nan) - 1 for run, ledger in zip(runs, ledgers)])


def fit_verdicts(runs: Sequence[PublishedRun], out_of_memory: Sequence[PublishedRun]) -> dict[str, Any]:
    """How often "fits" is said of runs that ran, and "doesn't fit" of runs that a source reports out of memory.

    A run whose recomputation isn't stated ran with some: it is asked once under our assumption (the least whose lower bound
    fits), and once whether any recomputation fits.
    """
    stated = [run for run in runs if not run.assumed_recompute and not run.oom]
    ran = [make_ledger(run.job, 1.0) for run in stated]
    open_runs = [run for run in runs if run.assumed_recompute and not run.oom]
    assumed = [make_ledger(run.job, 1.0) for run in open_runs]
    some = [any(make_ledger(replace(run.job, recompute=step), 1.0).fits for step in RECOMPUTE_LADDER) for run in open_runs]
    real = [run for run in out_of_memory if run.apart is None]
    short = [not make_ledger(run.job, 1.0).fits for run in real]
    return {
        "ran": len(ran),
        "ran_said_fits": sum(ledger.fits for ledger in ran),
        "ran_refused": sum(ledger.low_gib > ledger.capacity_gib for ledger in ran),
        "ran_with_recompute_not_stated": len(assumed),
        "ran_with_recompute_not_stated_said_fits": sum(ledger.fits for ledger in assumed),
        "ran_with_recompute_not_stated_some_fits": sum(some),
        "out_of_memory_by_fragmentation": len(out_of_memory) - len(real),
        "out_of_memory": len(short),
        "out_of_memory_said_too_large": sum(short),
    }


def memory_verdicts(runs: Sequence[PublishedRun], out_of_memory: Sequence[PublishedRun]) -> dict[str, dict[str, int]]:
    """How often each verdict falls on runs that ran with stated recomputation, and on runs that a source reports out of memory,
    those that its allocator's fragmentation stopped among them."""
    ran = [run for run in runs if not run.assumed_recompute and not run.oom]
    groups = {"ran": ran, "ran out of memory": out_of_memory}
    found = {name: Counter(make_ledger(run.job, 1.0).verdict for run in group) for name, group in groups.items()}
    return {name: {verdict: counts[verdict] for verdict in VERDICTS} for name, counts in found.items()}


def validate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole document (DESIGN: rows, skipped, tokens_per_s, memory; and what stands beside it)."""
    timed, skipped = runs_of(rows, "time")
    usual = [run for run in timed if run.apart is None]
    apart = [run for run in timed if run.apart is not None]
    weighed, skipped_memory = runs_of(rows, "memory")
    by_group = unseen_errors(usual, lambda run: run.group) if usual else np.zeros(0)
    by_source = unseen_errors(usual, lambda run: run.source) if usual else np.zeros(0)
    calibrated = calibrated_errors(usual, by_source)
    has_other = ~np.isnan(calibrated)
    measured = [run for run in weighed if run.memory_gb is not None and not run.oom]
    return {
        "rows": len(rows),
        "skipped": dict(sorted(skipped.items())),
        "assumed": dict(sorted(Counter(what for run in timed for what in run.assumed).items())),
        "tokens_per_s": statistics(np.exp(-by_group) - 1, usual),
        "tokens_per_s_source_unseen": statistics(np.exp(-by_source) - 1, usual),
        "tokens_per_s_calibrated": statistics(calibrated[has_other], [run for run, has in zip(usual, has_other) if has]),
        "tokens_per_s_constant_mfu": statistics(constant_mfu_errors(usual), usual, False),
        "apart": _apart(apart),
        "memory": statistics(memory_errors(measured), measured),
        "memory_skipped": dict(sorted(skipped_memory.items())),
        "fits": fit_verdicts(usual, [run for run in weighed if run.oom]),
        "memory_verdicts": memory_verdicts(usual, [run for run in weighed if run.oom]),
    }


def _apart(runs: Sequence[PublishedRun]) -> dict[str, Any]:
    """Rows that are reported by themselves, by reason."""
    errors = np.array([1.0] * 0) if not runs else np.exp(-unseen_errors(runs, lambda run: run.group)) - 1
    reasons = np.array([run.apart for run in runs])
    return {str(name): statistics(errors[reasons == name], [], False) for name in sorted(set(reasons))}
