"""The memory ledger: GiB that a rank of each pipeline stage holds at its peak, with a range.

In: a PlannedJob. Out: a `MemoryLedger` with one `RankMemory` per stage. `allocated_gib` predicts
torch.cuda.max_memory_allocated. A GPU must hold more than that: the CUDA context, communicators outside torch's allocator,
and the bytes lost to fragmentation.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel.memory import activations
from parallel.memory.activations import KeptActivations
from parallel.memory.hardware import GIB
from parallel.memory.job import PlannedJob
from parallel.memory.weights import RankParameters, StateBytes, layer_held, stage_held, state_bytes

# Outside the allocator: CUDA context and kernels, and one communicator's buffers (NCCL, per group that a rank is in).
CONTEXT_GIB, COMMUNICATOR_GIB = 0.9, 0.25
# Share of the allocated bytes lost between blocks: of dense models, and of MoE models, whose tensors change size every step.
FRAGMENTATION_DENSE, FRAGMENTATION_MOE = 0.03, 0.06
# The same with DeepSpeed's flat buffers. BLOOM's figures of nvidia-smi were a third above the sum of its tensors.
FRAGMENTATION_DEEPSPEED = 0.3
# Elements of a gradient bucket: of our DeepSpeed engine (a test compares it with pretrain/engine/deepspeed_runtime.py), and
# DeepSpeed's default.
BUCKET_ELEMENTS, FOREIGN_BUCKET_ELEMENTS = 50_000_000, 5e8
# DeepSpeed's default of stage3_max_live_parameters: gathered weights up to this number are not released.
LIVE_PARAMETERS = 1e9
# Tokens of the expert rank with most tokens over the mean: with a balanced router, and early in training.
IMBALANCE, IMBALANCE_HIGH = 1.1, 1.5
# Nine in ten published runs allocated at most so much more than planned, of what was planned (186 runs; tests/tools/planner).
UNDER_PLANNED = 0.13
FITS, AT_RISK, DOES_NOT_FIT = VERDICTS = ("fits", "at risk", "does not fit")
# Range of the activation bytes around the estimate: kernels differ in the tensors that they keep.
ACTIVATIONS_LOW, ACTIVATIONS_HIGH = 0.8, 1.15


@dataclass(frozen=True)
class RankMemory:
    """GiB of one rank of a stage.

    `buffers_gib` holds logits, gradients of the layer at work, gathered weights, and `overhead_gib`: CUDA context,
    communicators and fragmentation. `low_gib` and `high_gib` bound the total. `host_gib` is host memory of offload.
    """

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
        """Predicts torch.cuda.max_memory_allocated."""
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
class MemoryLedger:
    """The memory of every stage, and the usable memory of the GPU, in GiB."""

    ranks: tuple[RankMemory, ...]
    capacity_gib: float

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.total_gib)

    @property
    def peak_gib(self) -> float:
        return self.fullest.total_gib

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.capacity_gib

    @property
    def risk_gib(self) -> float:
        """The peak if the plan is as much too small as one in ten is."""
        return max(rank.total_gib + UNDER_PLANNED * rank.allocated_gib for rank in self.ranks)

    @property
    def verdict(self) -> str:
        """FITS; AT_RISK where the estimate fits and `risk_gib` does not; DOES_NOT_FIT."""
        if not self.fits:
            return DOES_NOT_FIT
        return FITS if self.risk_gib <= self.capacity_gib else AT_RISK

    @property
    def low_gib(self) -> float:
        """Lower bound of the peak: a GPU with less memory can't hold the job."""
        return max(rank.low_gib for rank in self.ranks)

    def as_dict(self) -> dict[str, object]:
        return {
            "ranks": [rank.as_dict() for rank in self.ranks],
            "peak_gib": round(self.peak_gib, 3),
            "range_gib": [round(self.low_gib, 3), round(max(rank.high_gib for rank in self.ranks), 3)],
            "fullest_stage": self.fullest.stage,
            "capacity_gib": round(self.capacity_gib, 3),
            "risk_gib": round(self.risk_gib, 3),
            "verdict": self.verdict,
        }


def bucket_bytes(job: PlannedJob, held: RankParameters) -> float:
    """Bytes of the buffers in which gradients are reduced. Megatron-Core reduces the gradients in place: 0."""
    states, zero = job.states, job.zero
    if zero.engine == "megatron":
        return 0.0
    if not zero.each_pass:
        return 0.0 if job.shards_weights else min(held.total, FOREIGN_BUCKET_ELEMENTS) * states.gradients
    # A bucket is allocated whole, however small the model is. Stages 1 and 2 have two when one is filled while the other is
    # reduced; stage 3 has one.
    if zero.stage in (1, 2):
        # Offloaded gradients pass through a buffer of the size of the largest parameter.
        largest = job.padded_vocab * job.model.hidden_size / job.layout.tensor * (zero.offload != "none")
        size = states.gradients if zero.stage == 1 else states.weights
        return (1 + zero.overlap) * BUCKET_ELEMENTS * size + states.weights * largest
    return BUCKET_ELEMENTS * states.gradients


def gathered_bytes(job: PlannedJob, held: RankParameters) -> float:
    """Bytes of the weights that ZeRO-3 gathers for two layers at a time, and of the gradients of one layer.

    DeepSpeed releases gathered weights only above LIVE_PARAMETERS of them.
    """
    if not job.shards_weights:
        return 0.0
    layer = max(layer_held(job, kind).total for kind in set(job.layer_kinds))
    size = 4 if job.compute == "fp32" else 2
    live = max(2 * layer, job.padded_vocab * job.model.hidden_size / job.layout.tensor)
    if job.zero.each_pass:
        live = max(live, min(held.total, LIVE_PARAMETERS))
    return size * live + job.states.gradients * layer


def transient_bytes(job: PlannedJob, stage: int, held: RankParameters, imbalance: float) -> float:
    """Short-lived bytes inside the allocator at the peak: logits or gradients of a layer, gathered weights, buckets."""
    kinds = {job.layer_kinds[layer] for chunk in job.stage_chunks[stage] for layer in chunk.layers}
    work = max((activations.working_bytes(job, kind, imbalance) for kind in kinds), default=0.0)
    if job.recompute.mode == "full":
        kept = max((activations.layer_bytes(job, kind, imbalance) for kind in kinds), default=0.0)
        work += kept * (job.recompute.num_layers if job.recompute.method == "uniform" else 1)
    if any(chunk.head for chunk in job.stage_chunks[stage]):
        work = max(work, activations.logit_bytes(job))
    return work + gathered_bytes(job, held) + bucket_bytes(job, held)


def communicators(job: PlannedJob) -> int:
    """Number of process groups of more than one rank that a rank is in. Each has a communicator with buffers of its own."""
    layout = job.layout
    sizes = (layout.tensor, layout.context, layout.pipeline, layout.data * layout.context, layout.expert, layout.expert_tensor,
             layout.expert_data if job.model.moe.num_experts else 1, layout.tensor * layout.pipeline)  # fmt: skip
    return sum(size > 1 for size in sizes)


def fragmentation(job: PlannedJob) -> float:
    """Share of the allocated bytes that is lost between blocks of the allocator."""
    if job.zero.engine == "deepspeed":
        return FRAGMENTATION_DEEPSPEED
    return FRAGMENTATION_MOE if job.model.moe.num_experts else FRAGMENTATION_DENSE


def _outside_bytes(job: PlannedJob) -> float:
    return GIB * (CONTEXT_GIB + COMMUNICATOR_GIB * communicators(job))


def _parts(
    job: PlannedJob, stage: int, held: RankParameters, imbalance: float, count: KeptActivations
) -> tuple[StateBytes, float, float, float]:
    """Bytes of a rank of the stage: (states, kept activations, short-lived tensors, overhead)."""
    states = state_bytes(job, held)
    kept, transient = activations.stage_activations(job, stage, count), transient_bytes(job, stage, held, imbalance)
    if job.zero.engine in ("fsdp", "fsdp2") and not job.whole_gradients:
        # PyTorch allocates gradients in the backward pass: they take the place of activations.
        states = replace(states, gradients=max(0.0, states.gradients - kept))
    return states, kept, transient, _outside_bytes(job) + fragmentation(job) * (states.total + kept + transient)


def _rank(
    job: PlannedJob,
    stage: int,
    held: RankParameters,
    imbalance: float,
    counts: tuple[KeptActivations, KeptActivations, KeptActivations],
) -> RankMemory:
    usual, *others = counts
    states, kept, transient, overhead = _parts(job, stage, held, imbalance, usual)
    balanced, early = (activations.stage_activations(job, stage, count) for count in others)
    return RankMemory(
        stage=stage,
        weights_gib=states.weights / GIB,
        gradients_gib=states.gradients / GIB,
        optimizer_gib=states.optimizer / GIB,
        activations_gib=kept / GIB,
        buffers_gib=(transient + overhead) / GIB,
        overhead_gib=overhead / GIB,
        low_gib=(states.total + ACTIVATIONS_LOW * balanced + GIB * CONTEXT_GIB) / GIB,
        high_gib=(states.total + ACTIVATIONS_HIGH * (early + transient) + _outside_bytes(job) + overhead) / GIB,
        host_gib=states.host / GIB,
    )


def quick_peak_gib(job: PlannedJob) -> float:
    """peak_gib of the job's ledger from the likely fullest stages only: the cheap filter of a search."""
    count, held = activations.kept_by_layer(job, IMBALANCE), stage_held(job)
    parts = (_parts(job, stage, held[stage], IMBALANCE, count) for stage in likely_fullest(job))
    return max(states.total + kept + transient + overhead for states, kept, transient, overhead in parts) / GIB


def likely_fullest(job: PlannedJob) -> set[int]:
    """Stages one of which has the peak: the first two (most micro-batches in flight), the last (logits), the longest."""
    last = job.layout.pipeline - 1
    longest = max(range(last + 1), key=lambda stage: sum(len(chunk.layers) for chunk in job.stage_chunks[stage]))
    return {0, min(1, last), last, longest}


def make_ledger(job: PlannedJob, imbalance: float | None = None) -> MemoryLedger:
    """The memory of every stage. `imbalance`: tokens of the expert rank with most tokens over the mean; 1.0: forced balance."""
    ratio = IMBALANCE if imbalance is None else imbalance
    counts = tuple(activations.kept_by_layer(job, each) for each in (ratio, 1.0, max(ratio, IMBALANCE_HIGH)))
    assert len(counts) == 3, "the usual router, a balanced one, and one early in training"
    ranks = tuple(_rank(job, stage, held, ratio, counts) for stage, held in enumerate(stage_held(job)))
    return MemoryLedger(ranks, job.machine.gpu.memory_gib)
