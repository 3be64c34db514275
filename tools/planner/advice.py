"""What would fit, or be faster: single changes to a config, tried.

In: a config and its plan. Out: changes in key=value words with what they bring, best first.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from configs.schema import Config, Recompute
from parallel.memory.job import make_job
from tools.planner.candidates import TIE, LayoutCandidate
from tools.planner.foreign import foreign_note
from tools.planner.legal import plan_problems
from tools.planner.planning import UNCALIBRATED, Calibration, Plan, make_plan, tensor_overlap_note
from tools.planner.search import SearchResult, recomputations
from tools.planner.step_cost import WORDS


@dataclass(frozen=True)
class Change:
    """One change and the plan it leads to."""

    words: str
    plan: Plan


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Single changes that save memory, legal or not."""
    parallel, batch = config.parallel, config.batch
    for step in recomputations(config):
        if step != config.recompute and step.mode != "none":
            yield _recompute_words(step), replace(config, recompute=step)
    if config.zero.stage == 0:
        yield "zero.stage=1", replace(config, zero=replace(config.zero, stage=1))
    if batch.micro_batch_seqs % 2 == 0:
        half = batch.micro_batch_seqs // 2
        yield f"batch.micro_batch_seqs={half}", replace(config, batch=replace(batch, micro_batch_seqs=half))
    for name in ("tensor", "pipeline", "context", "expert"):
        degree = 2 * getattr(parallel, name)
        yield f"parallel.{name}={degree}", replace(config, parallel=replace(parallel, **{name: degree}, pipeline_split=None))
    if (parallel.virtual_pipeline or 1) > 1:
        yield (
            "parallel.virtual_pipeline=null",
            replace(config, parallel=replace(parallel, virtual_pipeline=None, pipeline_split=None)),
        )
    nodes = 2 * config.launch.nodes
    yield f"launch.nodes={nodes}", replace(config, launch=replace(config.launch, nodes=nodes))


def _recompute_words(step: Recompute) -> str:
    modules = f" recompute.modules=[{','.join(step.modules)}]" if step.mode == "selective" else ""
    return f"recompute.mode={step.mode}{modules}"


def what_would_fit(config: Config, plan: Plan, vocab_size: int, calibration: Calibration = UNCALIBRATED) -> list[Change]:
    """Legal single changes after which it fits, fastest per token first; when none does, those that need least."""
    changes = []
    for words, changed in _changes(config):
        if not plan_problems(changed):
            changes.append(Change(words, make_plan(make_job(changed, vocab_size, plan.job.machine), calibration)))
    fitting = [change for change in changes if change.plan.fits]
    if fitting:
        return sorted(fitting, key=lambda change: -change.plan.tokens_per_s_per_gpu)
    saving = [change for change in changes if change.plan.ledger.peak_gib < plan.ledger.peak_gib]
    return sorted(saving, key=lambda change: change.plan.ledger.peak_gib)


def describe_change(change: Change, plan: Plan) -> str:
    """One line for people."""
    speed = change.plan.tokens_per_s_per_gpu / plan.tokens_per_s_per_gpu - 1
    fits = "fits" if change.plan.fits else "still too large"
    return f"{change.words}: {change.plan.ledger.peak_gib:.1f} GiB, {fits}; {speed:+.0%} tokens/s a GPU"


def _difference(one: Plan, other: Plan) -> str:
    """The kinds of time in which `other` loses most to `one`, both a step of the same batch."""
    kinds = set(one.timing.breakdown_s) | set(other.timing.breakdown_s)
    lost = {kind: other.timing.breakdown_s.get(kind, 0.0) - one.timing.breakdown_s.get(kind, 0.0) for kind in kinds}
    worst = sorted((kind for kind in lost if lost[kind] > 0.005 * one.timing.step_s), key=lambda kind: -lost[kind])[:2]
    return ", ".join(f"{WORDS[kind]} +{lost[kind]:.2f} s" for kind in worst) or "a little of everything"


# Layouts that people ask about: name, and which candidates have it.
POPULAR = (
    ("without tensor parallelism", lambda d: d.tensor == 1),
    ("tensor 8", lambda d: d.tensor == 8),
    ("without pipeline", lambda d: d.pipeline == 1),
    ("with pipeline", lambda d: d.pipeline > 1),
    ("without expert parallelism", lambda d: d.expert == 1),
    ("with context parallelism", lambda d: d.context > 1),
)


def explain(result: SearchResult) -> list[str]:
    """Why the winner wins and why popular alternatives lose, in words."""
    marks = [foreign_note(result.engine)] if result.engine else []
    if not result.candidates:
        return [*marks, "no layout fits: more GPUs, a larger GPU or a smaller batch are needed"]
    winner = result.candidates[0]
    lines = [
        *marks,
        _why(winner),
        f"layouts marked = are within {TIE:.0%} of the fastest: the model can't tell them apart; --robust lists among them first "
        "those with least tensor and context parallelism, then those whose tokens reach their experts without the NIC",
    ]
    for name, has in POPULAR:
        if has(winner.degrees):
            continue
        best = next((candidate for candidate in result.candidates if has(candidate.degrees)), None)
        if best is not None:
            slower = best.plan.timing.step_s / winner.plan.timing.step_s - 1
            how = (
                f"{slower:.0%} slower ({_difference(winner.plan, best.plan)})" if slower >= 0 else f"{-slower:.0%} faster: a tie"
            )
            lines.append(f"{name}: best {best.describe()}, {how}")
            continue
        large = [need for degrees, need in result.too_large.items() if has(degrees)]
        if large:
            lines.append(
                f"{name}: does not fit, the smallest needs {min(large):.0f} of {winner.plan.ledger.capacity_gib:.0f} GiB"
            )
    if winner.plan.job.sends_once:
        lines.append("model.moe.dispatcher=flex needs DeepEP or HybridEP on the GPUs; name alltoall to search without")
    waits = None if result.engine else tensor_overlap_note(winner.plan)
    return lines + ([waits] if waits else [])


def _why(winner: LayoutCandidate) -> str:
    timing, ledger = winner.plan.timing, winner.plan.ledger
    parts = sorted(timing.breakdown_s.items(), key=lambda item: -item[1])[:3]
    shares = ", ".join(f"{WORDS[kind]} {value / timing.step_s:.0%}" for kind, value in parts)
    return (
        f"{winner.describe()} wins: {winner.plan.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, {ledger.peak_gib:.0f} of "
        f"{ledger.capacity_gib:.0f} GiB; its time goes into {shares}"
    )
