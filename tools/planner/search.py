"""The best legal layouts of a config for its number of GPUs: `phalanx plan CONFIG --search`.

In: a config (its model, batch, cluster and world; its degrees, micro-batch, recomputation, ZeRO and, unless it is pinned, its
dispatcher are what is searched).
Out: a `SearchResult`: candidates, fastest first, and why others are refused. `parallel.legality.verdict` says what is legal, for
every candidate that fits. Deterministic: the same config gives the same list. With `engine`, all layouts are planned as that
engine of others would run them.

Cheap first: degrees that can't divide are never made; layouts whose states alone fill the GPU are dropped; the others are
timed once as they stand, and the best REFINED of them are tried with every micro-batch, number of chunks and
recomputation, of which only the lightest that fits is timed: each heavier one is slower.

Torch-free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from configs.model_schema import Model
from configs.schema import Config, Recompute, Zero
from parallel import architecture as arch
from parallel.flops import training_flops
from parallel.layout import world_size
from parallel.legality.engine import expert_overlap_problems
from parallel.legality.experts import may_be_flex
from parallel.memory.hardware import GIB, PlannedMachine
from parallel.memory.job import PlannedJob, make_job, recomputation_of
from parallel.memory.ledger import quick_peak_gib
from parallel.memory.weights import stage_held, state_bytes
from tools.planner.candidates import Degrees, LayoutCandidate, fastest_first
from tools.planner.foreign import FSDP2, as_engine, foreign_config, pytorch_recomputations
from tools.planner.legal import plan_problems
from tools.planner.planning import UNCALIBRATED, Calibration, make_plan
from tools.planner.timing import time_step

TENSOR, CONTEXT, MICRO, VIRTUAL = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20)
# Context parallelism pays from sequences of this many tokens a rank on.
CONTEXT_TOKENS = 8192
# Memory that a plan may fill: the rest is for what the estimate doesn't know.
FILL = 0.97
# Degrees tried in full; a layout that misses these is some 20% behind even before it has to recompute.
REFINED = 160


@dataclass(frozen=True)
class SearchResult:
    """`candidates` fastest first; `too_large` by what they would need, GiB; `refused`: rule → layouts; `engine`: as which engine
    of others they are planned, None for ours."""

    candidates: tuple[LayoutCandidate, ...]
    too_large: dict[Degrees, float]
    refused: dict[str, int]
    tried: int
    engine: str | None = None


def divisors(number: int, limit: int) -> list[int]:
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def degrees_of(config: Config, machine: PlannedMachine) -> Iterator[Degrees]:
    """Degrees that divide the world, the heads, the experts and the layers."""
    model, world = config.model, world_size(config)
    layers, experts = model.num_layers, model.moe.num_experts
    expert_sizes = divisors(experts, world) if experts else [1]
    for tensor in (t for t in TENSOR if t <= machine.domain and world % t == 0 and model.attention.num_heads % t == 0):
        for context in (c for c in CONTEXT if c == 1 or config.batch.seq_length_tokens / c >= CONTEXT_TOKENS / 2):
            for pipeline in divisors(world // tensor, min(layers, 64)):
                if world % (tensor * context * pipeline) or config.batch.global_batch_seqs % (
                    world // (tensor * context * pipeline)
                ):
                    continue
                for expert_tensor in sorted({1, tensor}) if experts else [1]:
                    for expert in expert_sizes:
                        span, usual = expert * expert_tensor, expert & (expert - 1) == 0 or expert == experts
                        if usual and world % (span * pipeline) == 0 and _lies_even(span, machine.domain):
                            yield Degrees(tensor, context, pipeline, expert, expert_tensor)


def _lies_even(span: int, domain: int) -> bool:
    """Whether a group of experts' ranks lies in one scale-up domain, or in whole ones: else every group is cut elsewhere."""
    return span <= domain or span % domain == 0


def recomputations(config: Config) -> list[Recompute]:
    """From none to full, as the model has parts for it."""
    model = config.model
    kinds = arch.moe_layers(model)
    delayed = config.precision.fp8 != "none" and config.precision.fp8_recipe == "delayed"
    light = [] if delayed else ["layernorm"]
    if any(kinds) and model.moe.grouped_gemm != "off" and not delayed:
        light.append("moe_act")
    if arch.is_mla(model):
        light.append("mla_up_proj")
    heavy = ["moe"] if any(kinds) else ["mlp"]
    steps = [Recompute(mode="none")]
    steps += [Recompute(mode="selective", modules=light)] if light else []
    steps += [Recompute(mode="selective", modules=[m for m in light if m != "moe_act"] + heavy)]
    return [*steps, Recompute(mode="full", method="uniform", num_layers=1)]


def virtual_chunks(config: Config, pipeline: int, micro_batches: int) -> list[int]:
    """One chunk a stage, and up to four numbers from the fewest to the most that fill evenly."""
    layers = config.model.num_layers
    if pipeline == 1 or micro_batches % pipeline:
        return [1]
    even = layers % pipeline == 0
    legal = [v for v in VIRTUAL if v > 1 and pipeline * v <= layers and not (even and layers % (pipeline * v))]
    thirds = [legal[len(legal) * part // 3] for part in range(3)] if legal else []
    return [1, *sorted({*thirds, *legal[-1:]})]


def zero_choices(config: Config) -> list[Zero]:
    """Megatron's distributed optimizer first, on GPUs with all of its traffic overlapped, then DeepSpeed's stages 2 and 3.

    A MoE model takes those only when nothing else fits: no published run of theirs could be fitted on.
    """
    own, gpu = config.zero, config.cluster.gpu is not None
    if own.engine == "deepspeed" or own.offload != "none":
        return [own]
    usual = replace(own, stage=1, overlap_grad_reduce=gpu or own.overlap_grad_reduce, overlap_param_gather=gpu)
    return [usual, *(Zero(engine="deepspeed", stage=stage) for stage in (2, 3))]


def flex_model(config: Config) -> Model:
    """The model with the dispatcher that sends a token once to each rank, where it may have it."""
    model = config.model
    return replace(model, moe=replace(model.moe, dispatcher="flex")) if may_be_flex(config) else model


def variants(config: Config, degrees: Degrees, micros: Sequence[int] = MICRO) -> Iterator[Config]:
    """Micro-batches and virtual chunks of these degrees, without recomputation."""
    data = world_size(config) // (degrees.tensor * degrees.context * degrees.pipeline)
    per_rank = config.batch.global_batch_seqs // data
    for micro in (m for m in micros if per_rank % m == 0):
        for virtual in virtual_chunks(config, degrees.pipeline, per_rank // micro):
            parallel = replace(
                config.parallel, tensor=degrees.tensor, context=degrees.context, pipeline=degrees.pipeline, sequence=None,
                expert=degrees.expert, expert_tensor=degrees.expert_tensor, pipeline_split=None,
                virtual_pipeline=virtual if virtual > 1 else None,
            )  # fmt: skip
            yield replace(config, parallel=parallel, batch=replace(config.batch, micro_batch_seqs=micro))


def with_expert_overlap(config: Config) -> Config:
    """Tokens travel beside another micro-batch wherever that may be; on the CPU it hides nothing."""
    overlaps = config.cluster.gpu is not None and not any(expert_overlap_problems(config))
    return replace(config, parallel=replace(config.parallel, overlap_expert_comm=overlaps))


class Searcher:
    """Goes through the degrees once and keeps what it learns."""

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        machine: PlannedMachine,
        calibration: Calibration,
        free_dispatcher: bool,
        engine: str | None,
    ) -> None:
        self.engine = engine
        config = foreign_config(config, engine) if engine else config
        self.config, self.vocab_size, self.machine, self.calibration = config, vocab_size, machine, calibration
        # Of layouts whose tokens travel: stacks of PyTorch send them by all-to-all.
        self.travelling = flex_model(config) if free_dispatcher and engine != FSDP2 else config.model
        # Of layouts whose tokens don't: flex is not for them.
        stays = config.model.moe.dispatcher == "flex"
        self.staying = replace(config.model, moe=replace(config.model.moe, dispatcher="alltoall")) if stays else config.model
        self.flops = training_flops(config.model, vocab_size, config.batch.seq_length_tokens).per_token
        self.steps = recomputations(config)
        self.zeros = [config.zero] if engine else zero_choices(config)
        self.reluctant = config.model.moe.num_experts > 0 and not engine
        self.found: list[LayoutCandidate] = []
        self.too_large: dict[Degrees, float] = {}
        self.refused: Counter[str] = Counter()
        self.tried = 0
        self.capacity = FILL * machine.gpu.memory_gib

    def first_look(self, degrees: Degrees) -> float | None:
        """Seconds a token of the degrees at their first micro-batch, None when the states alone don't fit."""
        config = list(variants(self.base(degrees), degrees, MICRO[:1]))[-1]
        need = 0.0
        for zero in self.zeros_of(degrees):
            job = self.job_of(self.overlapped(replace(config, zero=zero)))
            need = max(state_bytes(job, held).total for held in stage_held(job)) / GIB
            self.tried += 1
            if need <= self.capacity:
                return time_step(job).step_s
        self._note_large(degrees, need)
        return None

    def job_of(self, config: Config) -> PlannedJob:
        job = make_job(config, self.vocab_size, self.machine)
        return as_engine(job, self.engine) if self.engine else job

    def overlapped(self, config: Config) -> Config:
        """With expert traffic beside another micro-batch where Megatron-Core's schedule allows it: FSDP2 has no such schedule."""
        return config if self.engine == FSDP2 else with_expert_overlap(config)

    def steps_of(self, config: Config) -> list[Recompute]:
        return pytorch_recomputations(config) if self.engine == FSDP2 else self.steps

    def degrees(self) -> Iterator[Degrees]:
        """No experts cut by tensor parallelism under FSDP2: published runs of that were far slower than the model says."""
        found = degrees_of(self.config, self.machine)
        return (degrees for degrees in found if degrees.expert_tensor == 1 or self.engine != FSDP2)

    def base(self, degrees: Degrees) -> Config:
        """What the variants of the degrees have in common."""
        if degrees.expert > 1:
            return replace(self.config, model=self.travelling)
        return replace(self.config, model=self.staying) if degrees.expert_tensor == 1 else self.config

    def zeros_of(self, degrees: Degrees) -> list[Zero]:
        """The first is the usual one; sharding gradients and weights is for layouts without stages."""
        return self.zeros if degrees.pipeline == 1 and not self.reluctant else self.zeros[:1]

    def run(self) -> None:
        """The best degrees by a first look, each in full; again with all of ZeRO where that finds nothing."""
        looks = [(self.first_look(degrees), degrees) for degrees in self.degrees()]
        timed = sorted(((seconds, degrees) for seconds, degrees in looks if seconds is not None), key=lambda look: look[0])
        for _, degrees in timed[:REFINED]:
            self.visit(degrees)
        if self.reluctant and not self.found:
            self.reluctant = False
            self.run()

    def visit(self, degrees: Degrees) -> None:
        """Keeps the fastest legal variant of these degrees that fits; a higher ZeRO stage only where the one before doesn't."""
        for zero in self.zeros_of(degrees):
            if self.visit_zero(degrees, replace(self.base(degrees), zero=zero)):
                return

    def visit_zero(self, degrees: Degrees, base: Config) -> bool:
        fitting: list[tuple[float, int, Config]] = []
        for config in variants(base, degrees):
            first = self.job_of(config)
            for step in self.steps_of(config):
                self.tried += 1
                job = replace(first, recompute=recomputation_of(step))
                peak = quick_peak_gib(job) * self.calibration.memory_scale
                if peak <= self.capacity:
                    chosen = self.overlapped(replace(config, recompute=step))
                    job = replace(job, expert_overlap=chosen.parallel.overlap_expert_comm)
                    fitting.append((time_step(job).step_s, len(fitting), chosen))
                    break
                self._note_large(degrees, peak)
        return any(self._keep(config) for _, _, config in sorted(fitting, key=lambda item: item[:2]))

    def _note_large(self, degrees: Degrees, need_gib: float) -> None:
        self.too_large[degrees] = min(self.too_large.get(degrees, need_gib), need_gib)

    def _keep(self, config: Config) -> bool:
        problems = plan_problems(config)
        if problems:
            self.refused[f"{problems[0].path}: {problems[0].rule}"] += 1
            return False
        plan = make_plan(self.job_of(config), self.calibration, self.flops)
        self.found.append(LayoutCandidate(config, plan, engine=self.engine))
        return True


def search(
    config: Config,
    vocab_size: int,
    machine: PlannedMachine,
    calibration: Calibration = UNCALIBRATED,
    free_dispatcher: bool = True,
    engine: str | None = None,
) -> SearchResult:
    """Every layout for the config's world, one entry a layout with its best micro-batch, chunks and recomputation.

    `free_dispatcher`: tokens may travel by the flex dispatcher whatever the config says. `engine`: one of FOREIGN_ENGINES."""
    searcher = Searcher(config, vocab_size, machine, calibration, free_dispatcher, engine)
    searcher.run()
    best = {candidate.degrees for candidate in searcher.found}
    too_large = {degrees: need for degrees, need in searcher.too_large.items() if degrees not in best}
    refused = dict(searcher.refused.most_common())
    return SearchResult(fastest_first(searcher.found), too_large, refused, searcher.tried, engine)
