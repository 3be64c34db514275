"""Layouts that a search found, and their order.

In: legal layouts with their plans. Out: the same, fastest predicted first, or those first that lean least on what the model knows
least about.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.schema import Config
from tools.planner.planning import Plan

OVERLAPS = ("overlap_grad_reduce", "overlap_param_gather")
# Layouts this much slower than the fastest are alike to the model: by so much do its errors differ between two published layouts
# of one model and machine (the median).
TIE = 0.10


@dataclass(frozen=True)
class Degrees:
    tensor: int
    context: int
    pipeline: int
    expert: int
    expert_tensor: int

    @property
    def cuts(self) -> int:
        """Into how many pieces a token's own computation and sequence are cut."""
        return self.tensor * self.context * self.expert_tensor


@dataclass(frozen=True)
class LayoutCandidate:
    """A legal layout with its plan. `pareto`: no other is faster and needs less memory. `tie`: within TIE of the fastest.
    `engine`: the engine of others that it is planned as, None for ours."""

    config: Config
    plan: Plan
    pareto: bool = False
    tie: bool = False
    engine: str | None = None

    @property
    def words(self) -> list[str]:
        """The settings as key=value words. An engine of others has none of the `zero` section."""
        p, r, config = self.config.parallel, self.config.recompute, self.config
        words = [f"parallel.{name}={getattr(p, name)}" for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")]
        words += [
            f"parallel.virtual_pipeline={p.virtual_pipeline or 'null'}",
            f"batch.micro_batch_seqs={config.batch.micro_batch_seqs}",
        ]
        if config.model.moe.num_experts:
            words += [f"parallel.overlap_expert_comm={str(p.overlap_expert_comm).lower()}"]
            words += [f"model.moe.dispatcher={config.model.moe.dispatcher}"]
        words += [f"recompute.mode={r.mode}"]
        if r.mode == "selective":
            words += [f"recompute.modules=[{','.join(r.modules)}]"]
        if r.mode == "full":
            words += [f"recompute.method={r.method}", f"recompute.num_layers={r.num_layers}"]
        if self.engine:
            return words
        words += [f"zero.engine={config.zero.engine}", f"zero.stage={config.zero.stage}"]
        return words + [f"zero.{name}={str(getattr(config.zero, name)).lower()}" for name in OVERLAPS]

    @property
    def degrees(self) -> Degrees:
        p = self.config.parallel
        return Degrees(p.tensor, p.context, p.pipeline, p.expert, p.expert_tensor)

    @property
    def leans(self) -> tuple[int, bool]:
        """On what the model knows least about: cuts, and whether experts' tokens leave the scale-up domain."""
        degrees = self.degrees
        return degrees.cuts, degrees.expert * degrees.expert_tensor > self.plan.job.machine.domain

    def describe(self) -> str:
        text, zero = f"{self.plan.job.layout.describe()} mb{self.config.batch.micro_batch_seqs}", self.config.zero
        ours = f" {zero.engine} ZeRO-{zero.stage}" if zero.engine != "megatron" else ""
        text += f" {self.engine}" if self.engine else ours
        recompute = self.config.recompute
        if recompute.mode == "none":
            return text
        first = f" of {recompute.num_layers} layers a chunk" if recompute.mode == "full" and recompute.method == "block" else ""
        return f"{text} recompute {recompute.mode}{first}"


def fastest_first(candidates: Sequence[LayoutCandidate]) -> tuple[LayoutCandidate, ...]:
    """By predicted time, each marked whether it is a tie with the fastest and whether nothing faster needs less memory."""
    ordered = sorted(candidates, key=lambda c: (c.plan.timing.step_s, c.plan.ledger.peak_gib, c.words))
    least, marked = float("inf"), []
    for candidate in ordered:
        tie = candidate.plan.timing.step_s <= (1 + TIE) * ordered[0].plan.timing.step_s
        marked.append(replace(candidate, pareto=candidate.plan.ledger.peak_gib < least, tie=tie))
        least = min(least, candidate.plan.ledger.peak_gib)
    return tuple(marked)


def robust_first(candidates: Sequence[LayoutCandidate]) -> tuple[LayoutCandidate, ...]:
    """The ties first by how little they lean on what the model knows least about: cut sequences and narrow products, then
    experts' tokens over the NIC. The others stay as they are."""
    tied = [candidate for candidate in candidates if candidate.tie]
    return (*sorted(tied, key=lambda c: c.leans), *(candidate for candidate in candidates if not candidate.tie))
