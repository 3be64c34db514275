"""What a rank must do once a step, as seconds at the machine's full speed: gradients, weights, the update.

In: a PlannedJob. Out: [stage, kind], the kinds of step_cost.py. ZeRO-3's traffic of every pass is here too.

Torch-free.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from configs.model_schema import Model
from configs.optimizer_schema import Optimizer
from parallel import architecture as arch
from parallel.memory.job import PlannedJob
from parallel.memory.weights import RankParameters, stage_held
from parallel.muon import newton_schulz_flops, split_rows, updates_with_muon
from tools.convert.tensors.canonical_shapes import layer_shapes
from tools.planner.step_cost import INDEX, KINDS, Vector


def group_bandwidth_gb_s(job: PlannedJob, members: int, stride: int) -> float:
    """Ring bandwidth of a rank in a group of `members` ranks `stride` apart: in the domain, or over the NICs of those of
    its members that share a domain."""
    domain, gpu = job.machine.domain, job.machine.gpu
    if members * stride <= domain:
        return gpu.scaleup_gb_s
    together = max(1, domain // stride)
    return min(gpu.scaleup_gb_s, together * job.machine.nic_gb_s)


def data_bytes(job: PlannedJob) -> float:
    """Sent of each parameter in a step below ZeRO-3: gradients scattered and bf16 weights gathered; without sharded state, and in
    DeepSpeed's own stage 1 with bf16 (BLOOM's), gradients are reduced to all, which is twice as much."""
    zero, gradients = job.zero, float(job.states.gradients)
    if not zero.stage:
        return 2 * gradients
    if zero.each_pass:
        return job.num_micro_batches * gradients + 2
    return (2 * gradients if zero.engine == "deepspeed" else gradients) + 2


def _add_muon(job: PlannedJob, stage: int, held: RankParameters, vector: Vector) -> None:
    """What Muon adds to a stage's update, and what it saves: one moment less is read and written.

    The ranks of a stage share the matrices for Newton-Schulz in bf16. Each rank sends its part of them in fp32 and gets it back.
    """
    layout, gpu, matrices = job.layout, job.machine.gpu, held.matrices
    kept = matrices.dense / job.shard(layout.data * layout.context) + matrices.routed / job.shard(layout.expert_data)
    vector[INDEX["optimizer"]] -= kept * 2 * job.states.moment / (gpu.memory_gb_s * 1e9)
    ranks = layout.tensor * layout.context * layout.data
    kinds = [job.layer_kinds[layer] for chunk in job.stage_chunks[stage] for layer in chunk.layers]
    kinds += [arch.mtp_kind(job.model)] * sum(chunk.mtp for chunk in job.stage_chunks[stage])
    flops = sum(kinds.count(kind) * layer_muon_flops(job.model, kind, job.optimizer) for kind in set(kinds))
    vector[INDEX["gemm"]] += flops / ranks / (gpu.bf16_tflops * 1e12 * gpu.gemm_bf16)
    if ranks > 1:
        sent = 4 * (kept + (matrices.total if not job.zero.stage else kept)) * (ranks - 1) / ranks
        vector[INDEX["data"]] += sent / (1e9 * group_bandwidth_gb_s(job, ranks, 1))


def layer_muon_flops(model: Model, kind: arch.LayerKind, optimizer: Optimizer) -> float:
    """FLOPs of Newton-Schulz on the matrices of one layer, all its experts included."""
    total = 0.0
    for name, shape in layer_shapes(model, kind):
        if updates_with_muon(f".{name}", shape, optimizer):
            experts = shape[0] if len(shape) == 3 else 1
            for runs in split_rows(name, shape[-2], model, optimizer.muon):
                rows = sum(stop - start for start, stop in runs)
                total += experts * newton_schulz_flops(rows, shape[-1], optimizer.muon.ns_steps)
    return total


def step_work(job: PlannedJob) -> NDArray[np.float64]:
    """What each stage does once a step: gradients, weights, the update, [stage, kind]; ZeRO-3 does it for every pass."""
    layout, states = job.layout, job.states
    stages = np.zeros((layout.pipeline, len(KINDS)))
    groups = (layout.data * layout.context, layout.tensor), (layout.expert_data, layout.expert * layout.expert_tensor)
    for stage, held in enumerate(stage_held(job)):
        for number, (members, stride) in zip((held.dense, held.routed), groups):
            if members > 1 and number:
                bandwidth = 1e9 * group_bandwidth_gb_s(job, members, stride)
                part = (members - 1) / members
                if job.shards_weights:
                    # bf16 weights gathered forward and backward for every micro-batch; gradients scattered as often, or once a
                    # step: FSDP2's in fp32, as torchtitan sets it.
                    scattered = 1.0 if job.whole_gradients else job.num_micro_batches
                    num_bytes = 2 * 2 * job.num_micro_batches + scattered * (4 if job.zero.engine == "fsdp2" else 2)
                    stages[stage, INDEX["shards"]] += num_bytes * number * part / bandwidth
                else:
                    stages[stage, INDEX["data"]] += number * part * data_bytes(job) / bandwidth
        kept = held.dense / job.shard(layout.data * layout.context) + held.routed / job.shard(layout.expert_data)
        stages[stage, INDEX["optimizer"]] = kept * 2 * (states.optimizer + states.gradients) / (job.machine.gpu.memory_gb_s * 1e9)
        if job.optimizer.kind == "muon":
            _add_muon(job, stage, held, stages[stage])
    # With a pipeline the ranks' gradients and weights travel chunk by chunk beside the other chunks: one chunk's stays in sight
    # (Megatron-Bridge's docs/training/communication-overlap.md).
    if job.zero.overlap and not job.zero.each_pass and layout.pipeline > 1:
        stages[:, INDEX["data_beside"]] = stages[:, INDEX["data"]] * (1 - 1 / layout.virtual_pipeline)
        stages[:, INDEX["data"]] /= layout.virtual_pipeline
    stages[:, INDEX["steps"]] = 1.0
    return stages
