"""Parameters that a rank of each stage holds, and the bytes of its weights, gradients and optimizer state.

In: a PlannedJob. Out: `RankParameters` per stage (numbers of parameters), and their bytes under its ZeRO stage and offload.
Tensor parallelism divides dense parameters; expert x expert_tensor divides routed experts. Every rank holds norms, the
router, the down projections of multi-head latent attention (MLA) and the indexer of sparse attention whole.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from parallel import architecture as arch
from parallel.architecture import LayerKind
from parallel.memory import layer_cache
from parallel.memory.job import PlannedJob
from parallel.muon import layer_matrices
from parallel.stages import Chunk

# Bytes of one offloaded gradient element, as the optimizer on the host reads it: fp32.
HOST_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters on one rank. data x context ranks hold the same `dense` ones, expert_data ranks the same `routed`.

    `dense_matrices` and `routed_matrices`: those of them that Muon would update.
    """

    dense: float
    routed: float = 0.0
    dense_matrices: float = 0.0
    routed_matrices: float = 0.0

    def __add__(self, other: RankParameters) -> RankParameters:
        return RankParameters(
            self.dense + other.dense,
            self.routed + other.routed,
            self.dense_matrices + other.dense_matrices,
            self.routed_matrices + other.routed_matrices,
        )

    def __mul__(self, number: int) -> RankParameters:
        return RankParameters(
            number * self.dense, number * self.routed, number * self.dense_matrices, number * self.routed_matrices
        )

    @property
    def matrices(self) -> RankParameters:
        """The parameters that Muon would update."""
        return RankParameters(self.dense_matrices, self.routed_matrices)

    @property
    def total(self) -> float:
        return self.dense + self.routed


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank on its GPU; `host`: bytes that offload keeps in host memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def layer_held(job: PlannedJob, kind: LayerKind) -> RankParameters:
    """Parameters of one layer on one rank."""
    model, layout = job.model, job.layout
    counts = layer_cache.layer_counts(model, kind)
    whole = counts.norms + counts.router + counts.indexer
    divided = counts.attention + counts.dense + counts.shared
    matrices, expert_matrices = layer_matrices(model, kind, job.optimizer)
    whole_matrices = counts.indexer + (counts.router if job.optimizer.muon.router == "muon" else 0)
    if model.mla.kv_lora_rank is not None and not kind.delta:
        down = model.hidden_size * (model.mla.kv_lora_rank + model.mla.qk_rope_head_dim + (model.mla.q_lora_rank or 0))
        whole, divided, whole_matrices = whole + down, divided - down, whole_matrices + down
    expert_ranks = layout.expert * layout.expert_tensor
    return RankParameters(
        whole + divided / layout.tensor,
        counts.routed / expert_ranks,
        whole_matrices + (matrices - whole_matrices) / layout.tensor,
        expert_matrices / expert_ranks,
    )


def chunk_held(job: PlannedJob, chunk: Chunk, by_kind: dict[LayerKind, RankParameters]) -> RankParameters:
    """Parameters of one chunk on one rank. `by_kind`: those of one layer."""
    model, tensor = job.model, job.layout.tensor
    table = job.padded_vocab * model.hidden_size / tensor
    held = RankParameters(0.0)
    for kind, number in layer_cache.kinds_among(model, chunk.layers).items():
        held += by_kind[kind] * number
    if chunk.embedding:
        held += RankParameters(table + (model.max_position_tokens or 0) * model.hidden_size * (model.position.kind == "learned"))
    if chunk.mtp:
        projection = 2 * model.hidden_size**2 / tensor
        held += (by_kind[arch.mtp_kind(model)] + RankParameters(projection, dense_matrices=projection)) * chunk.mtp
        # Multi-token prediction embeds tokens again: on a stage other than the first it has a copy of the table.
        held += RankParameters(0.0 if chunk.embedding else table)
    if chunk.head:
        held += RankParameters(model.hidden_size * (2 if model.norm == "layernorm" else 1))
    if chunk.head and not (model.tie_embeddings and (chunk.embedding or chunk.mtp)):
        held += RankParameters(table)
    return held


class _ShardedShape:
    """A job as a cache key. Jobs with equal keys hold equal parameters on each rank; a search tries dozens of micro-batches
    and recomputations for one key."""

    def __init__(self, job: PlannedJob) -> None:
        layout = job.layout
        degrees = (layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.expert, layout.expert_tensor)
        self.job, self.key = job, (id(job.model), job.vocab, job.split, degrees, job.optimizer.muon.router)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ShardedShape) and other.key == self.key


def stage_held(job: PlannedJob) -> tuple[RankParameters, ...]:
    """Parameters of one rank of each stage."""
    return _stage_held(_ShardedShape(job))


@lru_cache(maxsize=2048)
def _stage_held(shape: _ShardedShape) -> tuple[RankParameters, ...]:
    job = shape.job
    by_kind = {kind: layer_held(job, kind) for kind in job.used_kinds}
    stages = [RankParameters(0.0)] * job.layout.pipeline
    for chunk in job.chunks:
        stages[chunk.stage] += chunk_held(job, chunk, by_kind)
    return tuple(stages)


def state_bytes(job: PlannedJob, held: RankParameters) -> StateBytes:
    """Bytes of one rank's weights, gradients and optimizer state.

    ZeRO (arXiv 1910.02054): stage 1 divides optimizer state, stage 2 also gradients, stage 3 also weights. With offload in
    deepspeed 0.19.8 the host holds the optimizer state and fp32 gradients for the update. At stages 1 and 2 it also holds a
    copy of the rank's part of the weights, and accumulated gradients stay on the GPU; at stage 3 it holds those too.
    """
    layout, states, stage = job.layout, job.states, job.zero.stage
    dense_shards = job.shard(layout.data * layout.context)
    expert_shards = job.shard(layout.expert_data)

    def bytes_of(size: int, divided: bool, held: RankParameters = held) -> float:
        if not divided:
            return size * held.total
        return size * (held.dense / dense_shards + held.routed / expert_shards)

    weights = bytes_of(states.weights, stage >= 3)
    gradients = bytes_of(states.gradients, job.shards_gradients and not job.whole_gradients)
    optimizer = bytes_of(states.optimizer, stage >= 1)
    if job.optimizer.kind == "muon":
        optimizer -= bytes_of(states.moment, stage >= 1, held.matrices)
    host = 0.0
    if job.zero.offload != "none":
        host, optimizer = optimizer + bytes_of(HOST_GRADIENT_BYTES, True), 0.0
        if stage == 3:
            host, gradients = host + gradients, 0.0
        else:
            host += bytes_of(states.weights, True)
    if job.zero.offload == "param":
        host, weights = host + weights, 0.0
    return StateBytes(weights, gradients, optimizer, host)
