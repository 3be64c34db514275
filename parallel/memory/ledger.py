"""The memory ledger: what each rank holds at its fullest moment, with a range.

In: a Job. Out: a `Ledger` of one `Rank` per stage. `allocated` is what torch.cuda.max_memory_allocated would say; a GPU
must hold more: the CUDA context, communicators outside torch's allocator, and what fragmentation wastes.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.memory import activations
from parallel.memory.activations import Kept
from parallel.memory.hardware import GIB
from parallel.memory.job import Job
from parallel.memory.weights import Held, StateBytes, layer_held, stage_held, state_bytes

# Outside the allocator: CUDA context and kernels, and one communicator's buffers (NCCL, per group that a rank is in).
CONTEXT_GIB, COMMUNICATOR_GIB = 0.9, 0.25
# Part of the allocated bytes lost between blocks: usual, and where dropless routing changes sizes every step.
FRAGMENTATION_DENSE, FRAGMENTATION_MOE = 0.03, 0.06
# DeepSpeed's flat buffers: BLOOM's nvidia-smi figures stood a third above what the tensors add up to.
FRAGMENTATION_DEEPSPEED = 0.3
# Elements of a bucket: our DeepSpeed engine's (pretrain/engine/deepspeed_runtime.py; a test compares), DeepSpeed's default.
BUCKET_ELEMENTS, FOREIGN_BUCKET_ELEMENTS = 50_000_000, 5e8
# DeepSpeed's default: gathered weights that it doesn't give up again for others.
LIVE_PARAMETERS = 1e9
# Tokens of the fullest expert rank over the mean: what a balanced router reaches, and a young one.
IMBALANCE, IMBALANCE_HIGH = 1.1, 1.5
# Uncertainty of the activations' count (kernels differ in what they keep).
ACTIVATIONS_LOW, ACTIVATIONS_HIGH = 0.8, 1.15


@dataclass(frozen=True)
class Rank:
    """One rank of a stage, GiB. `buffers`: logits, gradients under way, gathered weights, communicators, fragmentation."""

    stage: int
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    buffers_gib: float
    overhead_gib: float
    low_gib: float
    high_gib: float
    host_gib: float

    @property
    def allocated_gib(self) -> float:
        """What torch's allocator hands out at the peak."""
        return self.total_gib - self.overhead_gib

    @property
    def total_gib(self) -> float:
        parts = (self.weights_gib, self.gradients_gib, self.optimizer_gib, self.activations_gib, self.buffers_gib)
        return sum(parts)

    def as_dict(self) -> dict[str, float | int]:
        names = ("weights_gib", "gradients_gib", "optimizer_gib", "activations_gib", "buffers_gib", "total_gib", "low_gib",
                 "high_gib", "allocated_gib", "host_gib")  # fmt: skip
        return {"stage": self.stage} | {name: round(float(getattr(self, name)), 3) for name in names}


@dataclass(frozen=True)
class Ledger:
    """All stages, and what the GPU has."""

    ranks: tuple[Rank, ...]
    capacity_gib: float

    @property
    def fullest(self) -> Rank:
        return max(self.ranks, key=lambda rank: rank.total_gib)

    @property
    def peak_gib(self) -> float:
        return self.fullest.total_gib

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.capacity_gib

    @property
    def low_gib(self) -> float:
        """Even the most favourable count needs this."""
        return max(rank.low_gib for rank in self.ranks)

    def as_dict(self) -> dict[str, object]:
        return {
            "ranks": [rank.as_dict() for rank in self.ranks],
            "peak_gib": round(self.peak_gib, 3),
            "range_gib": [round(self.low_gib, 3), round(max(rank.high_gib for rank in self.ranks), 3)],
            "fullest_stage": self.fullest.stage,
            "capacity_gib": round(self.capacity_gib, 3),
        }


def bucket_bytes(job: Job, held: Held) -> float:
    """Buffers in which gradients travel. Megatron's are the gradients themselves."""
    states, zero = job.states, job.zero
    if zero.engine == "megatron":
        return 0.0
    if not zero.each_pass:
        return 0.0 if job.shards_weights else min(held.total, FOREIGN_BUCKET_ELEMENTS) * states.gradients
    # Whole however small the model is. Two of them when one is filled while the other travels; stage 3 keeps one.
    if zero.stage in (1, 2):
        # Offloaded gradients go through a buffer of the largest parameter's size.
        largest = job.padded_vocab * job.model.hidden_size / job.layout.tensor * (zero.offload != "none")
        size = states.gradients if zero.stage == 1 else states.weights
        return (1 + zero.overlap) * BUCKET_ELEMENTS * size + states.weights * largest
    return BUCKET_ELEMENTS * states.gradients


def gathered_bytes(job: Job, held: Held) -> float:
    """Weights that ZeRO-3 gathers for the layers at work (two at a time), with the gradients of one.

    DeepSpeed lets gathered weights be until LIVE_PARAMETERS of them are there (stage3_max_live_parameters).
    """
    if not job.shards_weights:
        return 0.0
    kinds = set(job.moe_layers)
    layer = max(layer_held(job, is_moe).total for is_moe in kinds)
    size = 4 if job.compute == "fp32" else 2
    live = max(2 * layer, job.padded_vocab * job.model.hidden_size / job.layout.tensor)
    if job.zero.each_pass:
        live = max(live, min(held.total, LIVE_PARAMETERS))
    return size * live + job.states.gradients * layer


def transient_bytes(job: Job, stage: int, held: Held, imbalance: float) -> float:
    """What comes and goes inside the allocator at the fullest moment: logits or a layer's gradients, gathered weights."""
    kinds = {job.moe_layers[layer] for chunk in job.stage_chunks[stage] for layer in chunk.layers}
    work = max((activations.working_bytes(job, is_moe, imbalance) for is_moe in kinds), default=0.0)
    if job.recompute.mode == "full":
        kept = max((activations.layer_bytes(job, is_moe, imbalance) for is_moe in kinds), default=0.0)
        work += kept * (job.recompute.num_layers if job.recompute.method == "uniform" else 1)
    if any(chunk.head for chunk in job.stage_chunks[stage]):
        work = max(work, activations.logit_bytes(job))
    return work + gathered_bytes(job, held) + bucket_bytes(job, held)


def communicators(job: Job) -> int:
    """Groups of more than one rank that a rank belongs to: each has a communicator with its buffers."""
    layout = job.layout
    sizes = (layout.tensor, layout.context, layout.pipeline, layout.data * layout.context, layout.expert, layout.expert_tensor,
             layout.expert_data if job.model.moe.num_experts else 1, layout.tensor * layout.pipeline)  # fmt: skip
    return sum(size > 1 for size in sizes)


def fragmentation(job: Job) -> float:
    """Part of the allocated bytes that is lost between blocks."""
    if job.zero.engine == "deepspeed":
        return FRAGMENTATION_DEEPSPEED
    return FRAGMENTATION_MOE if job.model.moe.num_experts else FRAGMENTATION_DENSE


def _outside_bytes(job: Job) -> float:
    return GIB * (CONTEXT_GIB + COMMUNICATOR_GIB * communicators(job))


def _parts(job: Job, stage: int, held: Held, imbalance: float, count: Kept) -> tuple[StateBytes, float, float, float]:
    """Bytes of a rank of the stage: (states, kept activations, what comes and goes, overhead)."""
    states = state_bytes(job, held)
    kept, transient = activations.stage_activations(job, stage, count), transient_bytes(job, stage, held, imbalance)
    return states, kept, transient, _outside_bytes(job) + fragmentation(job) * (states.total + kept + transient)


def _rank(job: Job, stage: int, held: Held, imbalance: float, counts: tuple[Kept, Kept, Kept]) -> Rank:
    usual, *others = counts
    states, kept, transient, overhead = _parts(job, stage, held, imbalance, usual)
    balanced, young = (activations.stage_activations(job, stage, count) for count in others)
    return Rank(
        stage=stage,
        weights_gib=states.weights / GIB,
        gradients_gib=states.gradients / GIB,
        optimizer_gib=states.optimizer / GIB,
        activations_gib=kept / GIB,
        buffers_gib=(transient + overhead) / GIB,
        overhead_gib=overhead / GIB,
        low_gib=(states.total + ACTIVATIONS_LOW * balanced + GIB * CONTEXT_GIB) / GIB,
        high_gib=(states.total + ACTIVATIONS_HIGH * (young + transient) + _outside_bytes(job) + overhead) / GIB,
        host_gib=states.host / GIB,
    )


def quick_peak_gib(job: Job) -> float:
    """A ledger's peak_gib: a search's filter."""
    count, held = activations.kept_by_layer(job, IMBALANCE), stage_held(job)
    parts = (_parts(job, stage, held[stage], IMBALANCE, count) for stage in likely_fullest(job))
    return max(states.total + kept + transient + overhead for states, kept, transient, overhead in parts) / GIB


def likely_fullest(job: Job) -> set[int]:
    """Stages among which the fullest is: the first two (most micro-batches wait), the last (logits), the longest."""
    last = job.layout.pipeline - 1
    longest = max(range(last + 1), key=lambda stage: sum(len(chunk.layers) for chunk in job.stage_chunks[stage]))
    return {0, min(1, last), last, longest}


def make_ledger(job: Job, imbalance: float | None = None) -> Ledger:
    """The memory of every stage. `imbalance`: tokens of the fullest expert rank over the mean (1.0: forced balance)."""
    ratio = IMBALANCE if imbalance is None else imbalance
    counts = tuple(activations.kept_by_layer(job, each) for each in (ratio, 1.0, max(ratio, IMBALANCE_HIGH)))
    assert len(counts) == 3, "the usual, the balanced and the young router"
    ranks = tuple(_rank(job, stage, held, ratio, counts) for stage, held in enumerate(stage_held(job)))
    return Ledger(ranks, job.machine.gpu.memory_gib)
