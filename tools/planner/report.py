"""Plans, searches and validations as text tables.

In: their values. Out: text.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.units import count, duration
from parallel.memory.ledger import VERDICTS
from tools.planner.candidates import LayoutCandidate
from tools.planner.duration import RunEstimate
from tools.planner.planning import Plan
from tools.planner.risk import risk_of
from tools.planner.search import SearchResult
from tools.planner.step_cost import WORDS
from tools.text_table import table

# Layouts of a search whose risk is told.
RISKS = 5


def memory_table(plan: Plan) -> str:
    """GiB of every stage; more than eight stages: the ends and the fullest."""
    ranks = plan.ledger.ranks
    shown = ranks if len(ranks) <= 8 else [r for r in ranks if r.stage in (0, 1, len(ranks) - 1, plan.ledger.fullest.stage)]
    rows = [
        [str(rank.stage), *(f"{value:.1f}" for value in (rank.weights_gib, rank.gradients_gib, rank.optimizer_gib,
                                                         rank.activations_gib, rank.buffers_gib, rank.total_gib)),
         f"{rank.low_gib:.0f}-{rank.high_gib:.0f}"]
        for rank in shown
    ]  # fmt: skip
    header = ("stage", "weights", "gradients", "optimizer", "activations", "buffers", "total", "range")
    verdict = plan.ledger.verdict if plan.fits else plan.ledger.verdict.upper()
    fullest = plan.ledger.fullest
    line = f"fullest: stage {fullest.stage}, {fullest.total_gib:.1f} of {plan.ledger.capacity_gib:.1f} GiB: {verdict}"
    return f"memory of a rank, GiB\n{table(header, rows)}\n{line}"


def time_table(plan: Plan) -> str:
    """Where a step's time goes."""
    timing = plan.timing
    parts = sorted(timing.breakdown_s.items(), key=lambda item: -item[1])
    rows = [
        [WORDS[kind], f"{value:.3f}", f"{value / timing.step_s:.0%}"] for kind, value in parts if value >= 0.002 * timing.step_s
    ]
    head = (
        f"step {timing.step_s:.3f} s, {plan.tokens_per_s_per_gpu:,.0f} tokens/s a GPU "
        f"({count(plan.tokens_per_s_per_gpu * plan.job.layout.world_size)} in all), {plan.tflops_per_gpu:.0f} TFLOP/s, "
        f"MFU {plan.mfu:.1%} of the bf16 peak, bubble {timing.bubble_fraction:.1%}"
    )
    return f"{head}\n{table(('time', 's', 'share'), rows)}"


def run_text(run: RunEstimate) -> str:
    cost = "" if run.cost_usd is None else f", ${run.cost_usd:,.0f}"
    return (
        f"run: {run.steps:,} steps, {count(run.tokens)} tokens, {run.days:.2f} days, {run.gpu_hours:,.0f} GPU-hours{cost}\n"
        f"checkpoint: {run.checkpoint_gib:,.1f} GiB a save; save every {duration(run.interval_s)} ({run.interval_steps:,} steps) "
        f"at a failure every {run.mtbf_hours:,.1f} h; goodput {run.goodput:.1%}, {run.days / run.goodput:.2f} days with failures"
    )


def plan_text(name: str, plan: Plan, run: RunEstimate, model: dict[str, Any], notes: Sequence[str]) -> str:
    """The whole plan of one layout."""
    job = plan.job
    head = (
        f"{name}: {job.model.name}, {count(float(model['params_total']))} parameters, "
        f"{count(float(model['params_active']['all']))} active, {model['flops_per_token'] / 1e9:.2f} GFLOP a token\n"
        f"{job.layout.describe()} on {job.layout.world_size} x {job.machine.gpu.name}, {job.num_micro_batches:g} micro-batches "
        f"of {job.micro_batch} x {job.seq_length} tokens"
    )
    text = "\n\n".join([head, memory_table(plan), time_table(plan), run_text(run)])
    return text + ("\n\n" + "\n".join(f"note: {note}" for note in notes) if notes else "")


def risk_table(candidates: Sequence[LayoutCandidate]) -> str:
    """What may make the first layouts slower or larger than planned."""
    rows = [[f"{rank}  {candidate.describe()}", *(f"{value:.0%}" for value in risk_of(candidate.plan).as_dict().values())]
            for rank, candidate in enumerate(candidates, start=1)]  # fmt: skip
    return table(("risk of the first", "NIC", "launches", "memory free"), rows)


def search_text(result: SearchResult, top: int, reasons: Sequence[str]) -> str:
    """The best layouts, and why."""
    rows = [
        [f"{rank}{'=' if candidate.tie else ' '} {candidate.describe()}", f"{candidate.plan.timing.step_s:.3f}",
         f"{candidate.plan.tokens_per_s_per_gpu:,.0f}", f"{candidate.plan.mfu:.1%}",
         f"{candidate.plan.timing.bubble_fraction:.0%}", f"{candidate.plan.ledger.peak_gib:.1f}",
         "*" if candidate.pareto else ""]
        for rank, candidate in enumerate(result.candidates[:top], start=1)
    ]  # fmt: skip
    head = f"{result.tried:,} layouts tried: {len(result.candidates)} legal ones fit, {len(result.too_large)} are too large"
    head += f"\nas {result.engine} would run them: NOT RUNNABLE by Phalanx" if result.engine else ""
    lines = [head, table(("layout", "step s", "tokens/s/GPU", "MFU", "bubble", "GiB", "pareto"), rows)]
    if result.candidates:
        lines += ["", risk_table(result.candidates[: min(top, RISKS)])]
    lines += ["", *reasons]
    if result.candidates:
        words = [*result.candidates[0].words, *([f"--engine {result.engine}"] if result.engine else [])]
        lines += ["", "settings of the best: " + " ".join(words)]
    return "\n".join(lines + [f"refused {number}: {rule}" for rule, number in result.refused.items()])


def _line(name: str, part: dict[str, Any]) -> list[str]:
    shown = [part["median_abs_rel_err"], part["p90_abs_rel_err"], part["within_20pct"]]
    return [name, str(part["rows"]), *("-" if value is None else f"{value:.1%}" for value in shown)]


def validation_text(document: dict[str, Any]) -> str:
    """`plan-validate` for people."""
    header = ("", "rows", "median", "p90", "within 20%")
    lines = [f"{document['rows']} rows; not compared: {sum(document['skipped'].values())}"]
    lines += [f"  {number:4d}  {reason}" for reason, number in document["skipped"].items()]
    lines += [f"{number} of those compared take our word for the {what}" for what, number in document["assumed"].items()]
    names = {
        "tokens_per_s": "tokens/s, model and GPU unseen by the fit",
        "tokens_per_s_source_unseen": "tokens/s, whole source unseen",
        "tokens_per_s_calibrated": "tokens/s, one calibration run of the machine", "memory": "memory",
    }  # fmt: skip
    for key, title in names.items():
        part = document[key]
        rows = [_line("all", part)] + [_line(kind, part[kind]) for kind in ("dense", "moe") if kind in part]
        rows += [_line(f"  {source}", found) for source, found in part.get("by_source", {}).items()]
        lines += ["", title, table(header, rows)]
    others = [_line("a constant MFU instead", document["tokens_per_s_constant_mfu"])]
    others += [_line(f"apart: {reason}", part) for reason, part in document["apart"].items()]
    lines += ["", table(header, others), "", "fits: " + ", ".join(f"{key} {value}" for key, value in document["fits"].items())]
    verdicts = [[name, *(str(found[verdict]) for verdict in VERDICTS)] for name, found in document["memory_verdicts"].items()]
    lines += ["", table(("memory verdicts on jobs that", *VERDICTS), verdicts)]
    return "\n".join(lines)
