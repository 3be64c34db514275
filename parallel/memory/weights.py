"""Parameters that one rank of each stage holds, and the bytes of weights, gradients and optimizer state.

In: a Job. Out: `Held` per stage (numbers of parameters) and bytes under its ZeRO stage and offload. Legend: dense
parameters are divided by tensor, routed experts by expert x expert_tensor; norms, the router and MLA's down
projections lie whole on every rank.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from parallel.memory import layers as facts
from parallel.memory.job import Job
from parallel.stages import Chunk

# Of one offloaded parameter's gradient as the host's update reads it.
HOST_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Held:
    """Parameters on one rank: `dense` are alike on data x context ranks, `routed` on the experts' data ranks."""

    dense: float
    routed: float = 0.0

    def __add__(self, other: Held) -> Held:
        return Held(self.dense + other.dense, self.routed + other.routed)

    @property
    def total(self) -> float:
        return self.dense + self.routed


@dataclass(frozen=True)
class StateBytes:
    """Bytes on the GPU of one rank; `host` is what offload keeps beside it."""

    weights: float
    gradients: float
    optimizer: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def layer_held(job: Job, is_moe: bool) -> Held:
    """Parameters of one layer on one rank."""
    model, layout = job.model, job.layout
    counts = facts.layer_counts(model, is_moe)
    whole = counts.norms + counts.router
    divided = counts.attention + counts.dense + counts.shared
    if model.mla.kv_lora_rank is not None:
        down = model.hidden_size * (model.mla.kv_lora_rank + model.mla.qk_rope_head_dim + (model.mla.q_lora_rank or 0))
        whole, divided = whole + down, divided - down
    return Held(whole + divided / layout.tensor, counts.routed / (layout.expert * layout.expert_tensor))


def chunk_held(job: Job, chunk: Chunk, by_kind: tuple[Held, Held]) -> Held:
    """Parameters of one chunk on one rank. `by_kind`: of a dense and a MoE layer."""
    model, tensor = job.model, job.layout.tensor
    table = job.padded_vocab * model.hidden_size / tensor
    moe = facts.moe_among(model, chunk.layers)
    plain, routing = by_kind
    held = Held((len(chunk.layers) - moe) * plain.dense + moe * routing.dense, moe * routing.routed)
    if chunk.embedding:
        held += Held(table + (model.max_position_tokens or 0) * model.hidden_size * (model.position.kind == "learned"))
    if chunk.mtp:
        depth = by_kind[job.moe_layers[-1]]
        held += Held(chunk.mtp * (depth.dense + 2 * model.hidden_size**2 / tensor), chunk.mtp * depth.routed)
        # The prediction depths embed their tokens again: on another stage than the first that is a copy of the table.
        held += Held(0.0 if chunk.embedding else table)
    if chunk.head:
        held += Held(model.hidden_size * (2 if model.norm == "layernorm" else 1))
    if chunk.head and not (model.tie_embeddings and (chunk.embedding or chunk.mtp)):
        held += Held(table)
    return held


class _Shape:
    """A job as a key: equal where what its ranks hold is. Micro-batches and recomputation don't matter, of which a search tries
    dozens."""

    def __init__(self, job: Job) -> None:
        layout = job.layout
        degrees = (layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.expert, layout.expert_tensor)
        self.job, self.key = job, (id(job.model), job.vocab, job.split, degrees)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shape) and other.key == self.key


def stage_held(job: Job) -> tuple[Held, ...]:
    """Parameters of one rank of each stage."""
    return _stage_held(_Shape(job))


@lru_cache(maxsize=2048)
def _stage_held(shape: _Shape) -> tuple[Held, ...]:
    job = shape.job
    by_kind = (layer_held(job, False), layer_held(job, True) if any(job.moe_layers) else Held(0.0))
    stages = [Held(0.0)] * job.layout.pipeline
    for chunk in job.chunks:
        stages[chunk.stage] += chunk_held(job, chunk, by_kind)
    return tuple(stages)


def state_bytes(job: Job, held: Held) -> StateBytes:
    """Bytes of one rank's states. ZeRO paper (arXiv 1910.02054): stage 1 divides optimizer, 2 gradients, 3 weights.

    Offload, as deepspeed 0.19.8 has it: beside the optimizer the host holds fp32 gradients for the update, and at stages 1
    and 2 a copy of the weights' own part (the accumulated gradients stay on the GPU), at stage 3 the accumulated gradients.
    """
    layout, states, stage = job.layout, job.states, job.zero.stage
    dense_shards = job.shard(layout.data * layout.context)
    expert_shards = job.shard(layout.expert_data)

    def bytes_of(size: int, divided: bool) -> float:
        if not divided:
            return size * held.total
        return size * (held.dense / dense_shards + held.routed / expert_shards)

    weights = bytes_of(states.weights, stage >= 3)
    gradients = bytes_of(states.gradients, job.shards_gradients)
    optimizer = bytes_of(states.optimizer, stage >= 1)
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
