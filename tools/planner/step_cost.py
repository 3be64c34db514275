"""What one rank must do in a step, as seconds at the machine's full speed, by kind of work.

In: a PlannedJob. Out: a vector over `KINDS` (seconds that the work would take at peak compute, memory or network speed; kernels
and steps are counts). How far real machines stay below those speeds is timing.py's business. Forward and backward and
recomputation are in. Legend: t tokens of a micro-batch on a rank, h hidden, k experts of a token.

Torch-free.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from parallel import architecture as arch
from parallel.architecture import LayerKind
from parallel.flops import gathers_keys, index_pair_flops, mean_context
from parallel.memory import layer_cache
from parallel.memory.activations import DELTA_CHUNK_TOKENS, element_bytes
from parallel.memory.job import PlannedJob
from tools.planner.dispatch import remote_copies
from tools.planner.gemms import Gemm, attention_gemms, delta_net_gemms, indexer_gemms, mlp_gemms, routed_rows

KINDS = (
    "gemm",  # dense products in bf16 or fp32
    "gemm_fp8",  # the same in fp8
    "experts",  # products of the routed experts in bf16 or fp32
    "experts_fp8",  # the same in fp8
    "products_fp4",  # both in fp4
    "attention",  # scores and their sum over values
    "exponentials",  # of the softmax, by the special function units
    "memory",  # norms, activations, rotations, permutation, casts, loss
    "operands",  # what products read and write
    "casts",  # inputs and gradients of products turned into fp8 or fp4
    "scores",  # the score matrix of attention without flash, written and read
    "tensor",  # all-gather and reduce-scatter between tensor parallel ranks
    "expert_near",  # tokens to experts inside the scale-up domain
    "expert_far",  # tokens to experts over the NIC
    "context",  # keys and values around the ring
    "pipeline",  # activations to the next stage
    "passes",  # one micro-batch through one chunk and on to the next stage and back, a count: latency, and the schedule's host
    "data",  # gradients reduced and weights gathered once a step
    "data_beside",  # the same beside the work of other chunks
    "shards",  # weights gathered and gradients reduced for every pass (ZeRO-3)
    "optimizer",  # the update, at memory speed
    "gaps",  # between one kernel and the next on the GPU, a count
    "kernels",  # kernel launches, a count
    "expert_kernels",  # products, casts and permutations launched expert by expert: local experts, a count
    "steps",  # 1: what a step costs whatever its size
)
# What they are called, for people.
WORDS = {
    "gemm": "dense products", "gemm_fp8": "dense products, fp8", "experts": "expert products",
    "experts_fp8": "expert products, fp8", "products_fp4": "products, fp4", "attention": "attention scores",
    "exponentials": "softmax exponentials", "memory": "memory traffic", "operands": "products' traffic",
    "casts": "casts to fp8", "scores": "score matrix", "tensor": "tensor parallel", "expert_near": "tokens to experts, near",
    "expert_far": "tokens to experts, NIC", "context": "context ring", "pipeline": "stage to stage", "passes": "chunk passes",
    "data": "gradients, weights", "data_beside": "gradients, weights, beside",
    "shards": "ZeRO-3 shards", "optimizer": "optimizer", "gaps": "gaps between kernels",
    "kernels": "kernel launches", "expert_kernels": "experts' launches", "steps": "per step", "bubble": "pipeline bubble",
}  # fmt: skip
INDEX = {name: position for position, name in enumerate(KINDS)}
Vector = NDArray[np.float64]
# Kernels of a layer's forward and backward pass; a MoE layer routes, permutes and talks besides.
KERNELS_DENSE, KERNELS_MOE = 60, 200
# Bytes of an element of the score matrix written and read, forward and backward, without flash attention.
SCORE_BYTES = 30.0
# Backward over forward: flash attention makes the scores again (2.5), products twice (2).
FLASH_BACKWARD, GEMM_BACKWARD = 2.5, 2.0


def cast_bytes(job: PlannedJob) -> float:
    """Read and written to quantise one element for a product: it is read for its largest value and read again, written as it
    is and transposed; with block scales (GPUs that have fp4) it is read once."""
    gpu = job.machine.gpu
    return 4.0 if gpu.fp4_tflops > gpu.fp8_tflops else 6.0


class _Tally:
    """Adds work into a vector of one layer pass, forward plus backward."""

    def __init__(self, job: PlannedJob) -> None:
        self.job, self.vector = job, np.zeros(len(KINDS))
        gpu = job.machine.gpu
        self.attention_flop_s = gpu.bf16_tflops * 1e12 * gpu.gemm_bf16
        self.byte_s = gpu.memory_gb_s * 1e9

    def add(self, kind: str, seconds: float) -> None:
        self.vector[INDEX[kind]] += seconds

    def gemms(self, kind: str, gemms: list[Gemm], passes: float) -> None:
        """`passes`: 3 without recomputation (forward, input's and weight's gradient)."""
        job, gpu = self.job, self.job.machine.gpu
        compute = "bf16" if job.experts_only and kind == "gemm" else job.compute
        narrow = compute in ("fp8", "fp4")
        if narrow:
            kind = "products_fp4" if compute == "fp4" else f"{kind}_fp8"
        flop_s = gpu.peak_tflops(compute) * 1e12 * gpu.largest_gemm(compute) * gpu.clock
        for gemm in gemms:
            self.add(kind, passes * gemm.flops / flop_s)
            # The weight's gradient is added to what other micro-batches left.
            gradient = 2.0 * job.states.gradients * gemm.inner * gemm.columns * gemm.count
            if narrow:
                self.add("casts", cast_bytes(job) * gemm.count * gemm.rows * (gemm.inner + gemm.columns) / self.byte_s)
            read = passes * gemm.traffic(1.0 if narrow else element_bytes(job))
            self.add("operands", (read + gradient) / self.byte_s)

    def memory(self, num_bytes: float) -> None:
        self.add("memory", num_bytes / self.byte_s)


def _attention(tally: _Tally, window: int | None, again: float) -> None:
    """Scores of one layer. `again`: forward passes made once more (recomputation)."""
    job, model = tally.job, tally.job.model
    width = arch.query_dim(model) + arch.value_dim(model)
    if gathers_keys(model, job.seq_length):
        width, window = 2 * (model.mla.kv_lora_rank or 0) + model.mla.qk_rope_head_dim, model.dsa.top_k
    per_key = 2.0 * model.attention.num_heads / job.layout.tensor * width
    if job.flash:
        context = mean_context(job.seq_length, window, model.attention.window_kind == "chunked")
        flops = job.micro_tokens * per_key * context
        tally.add("attention", flops * (1 + again + FLASH_BACKWARD) / tally.attention_flop_s)
        scores = job.micro_tokens * model.attention.num_heads / job.layout.tensor * context
        tally.add("exponentials", scores * (2 + again) / job.machine.gpu.exponentials_s)
        return
    # Without flash attention the masked half is computed too.
    flops = job.micro_tokens * per_key * job.seq_length
    redo = again + ("core_attn" in job.recompute.dropped)
    tally.add("attention", flops * (1 + redo + GEMM_BACKWARD) / tally.attention_flop_s)
    elements = job.micro_tokens * job.seq_length * model.attention.num_heads / job.layout.tensor
    tally.add("scores", SCORE_BYTES * (1 + redo / 3) * elements / tally.byte_s)


def _indexer(tally: _Tally, again: float) -> None:
    """The indexer of one layer's sparse attention and its loss. Every tensor rank computes all of it.

    Forward it scores every key that a query may see, and the scores are written and read to choose among them. Its loss needs the
    attention's own scores of the chosen keys once more, and its backward pass makes their index scores again.
    """
    job, model, dsa, gpu = tally.job, tally.job.model, tally.job.model.dsa, tally.job.machine.gpu
    tally.gemms("gemm", indexer_gemms(job), 2 + again)
    if not arch.is_sparse(model):
        return
    seen, chosen, t = mean_context(job.seq_length, None), mean_context(job.seq_length, dsa.top_k), job.micro_tokens
    index_flop_s = gpu.peak_tflops(dsa.index_dtype) * 1e12 * gpu.largest_gemm(dsa.index_dtype)
    tally.add("attention", (1 + again) * t * index_pair_flops(model) * seen / index_flop_s)
    width = arch.query_dim(model)
    if gathers_keys(model, job.seq_length):
        width = (model.mla.kv_lora_rank or 0) + model.mla.qk_rope_head_dim
    target = 2.0 * model.attention.num_heads / job.layout.tensor * width
    tally.add("attention", t * chosen * (3 * index_pair_flops(model) + target) / tally.attention_flop_s)
    tally.add("exponentials", t * chosen * model.attention.num_heads / job.layout.tensor / gpu.exponentials_s)
    # fp32 scores; norm, rotation, Hadamard transform and cast of queries and key.
    rotated = (dsa.num_index_heads + 1) * dsa.index_head_dim
    tally.memory(t * ((1 + again) * 8.0 * seen + element_bytes(job) * 8 * rotated))


def _delta_net(tally: _Tally, again: float) -> None:
    """Convolution, states and gated norm of one layer's gated delta net, by the chunked algorithm of arXiv 2412.06464.

    A token meets the state of each value head in three products, and the c tokens of its chunk in three products of the width
    of keys and two of the width of values. The elementwise work moves each of its tensors about as often as a norm does its own.
    """
    job, net, widths = tally.job, tally.job.model.delta_net, arch.delta_widths(tally.job.model)
    states = 6.0 * net.key_head_dim * net.value_head_dim
    chunk = DELTA_CHUNK_TOKENS * (6.0 * net.key_head_dim + 4.0 * net.value_head_dim)
    flops = job.micro_tokens * net.num_value_heads / job.layout.tensor * (states + chunk)
    tally.add("attention", flops * (1 + again + FLASH_BACKWARD) / tally.attention_flop_s)
    moved = 6 * widths.mixed + 8 * widths.value
    stored = net.num_value_heads * net.key_head_dim * net.value_head_dim / DELTA_CHUNK_TOKENS
    tally.memory(element_bytes(job) * job.micro_tokens * (moved + 2 * stored) / job.layout.tensor * (3 + again))


def _between_ranks(tally: _Tally, kind: LayerKind, again: float) -> None:
    """Tensor and context parallel traffic of one layer."""
    job, layout, machine, model = tally.job, tally.job.layout, tally.job.machine, tally.job.model
    size = element_bytes(job)
    if layout.tensor > 1:
        blocks = 1 if kind.moe and not model.moe.shared_ffn_hidden_size else 2
        # Forward one gather and one scatter a block; backward the same and the input gathered again.
        rounds = blocks * ((5 if layout.sequence else 4) + 2 * again)
        num_bytes = rounds * job.micro_tokens * model.hidden_size * size * (layout.tensor - 1) / layout.tensor
        tally.add("tensor", num_bytes / (1e9 * machine.bandwidth_gb_s(layout.tensor)))
    if layout.context > 1:
        width = 2 * arch.num_query_groups(model) * arch.head_dim(model) / layout.tensor
        if arch.is_mla(model):
            width = model.attention.num_heads * (arch.query_dim(model) + arch.value_dim(model)) / layout.tensor
        if gathers_keys(model, job.seq_length):
            width = (model.mla.kv_lora_rank or 0) + model.mla.qk_rope_head_dim
        width += model.dsa.index_head_dim if arch.is_sparse(model) else 0
        num_bytes = (3 + again) * job.micro_tokens * width * size * (layout.context - 1)
        if kind.delta:
            # All-to-alls of what its input projection made and of its output, which turn tokens into heads and back.
            widths = arch.delta_widths(model)
            exchanged = (widths.projected + widths.value) / layout.tensor * (layout.context - 1) / layout.context
            num_bytes = (2 + again) * job.micro_tokens * exchanged * size
        tally.add("context", num_bytes / (1e9 * machine.bandwidth_gb_s(layout.tensor * layout.context)))


def _experts(tally: _Tally, again: float) -> None:
    """Routed experts of one layer: products, permutation and the way of the tokens."""
    job, model, layout = tally.job, tally.job.model, tally.job.layout
    h, moe, size = model.hidden_size, model.moe, element_bytes(job)
    rows, width = routed_rows(job), arch.expert_ffn(model)
    local = moe.num_experts / layout.expert
    redo = 1.0 if again or "moe" in job.recompute.dropped else 0.0
    tally.gemms("experts", mlp_gemms(job, width, rows, layout.expert_tensor, local), 3 + redo)
    gate = 2 if arch.is_gated(model) else 1
    # Sorted by expert and back: four moves forward, four backward. Tokens that came by all-to-all are sorted once more. The
    # activation reads and writes its widths.
    sorts = 3 if job.dispatcher == "alltoall" and layout.expert > 1 else 2
    moves = 4 * sorts * (1 + redo / 2) * 2 * rows / layout.expert_tensor * h
    activation = (3 * gate + 2 + ("moe_act" in job.recompute.dropped) * (gate + 1)) * rows * width / layout.expert_tensor
    # Transformer Engine's grouped product leaves biases to be added expert by expert and joined again: about 5 moves of the
    # first product's rows, with the probabilities 10 of the second's, forward and backward.
    biases = (5 * gate * width / layout.expert_tensor + 10 * h) * rows if model.mlp_bias else 0.0
    tally.memory(size * (moves + activation + biases))
    tokens = job.micro_tokens / (layout.tensor if layout.sequence else 1)
    near, far = remote_copies(job)
    ways = (4 + 2 * redo) * tokens * h * size / 1e9
    launches = 1.0 if job.grouped_launch else local
    tally.add("expert_kernels", launches * (1 + redo / 3))
    inside, outside = ways * near / job.machine.gpu.scaleup_gb_s, ways * far / job.machine.nic_gb_s
    # Spread inside the domain while the next tokens come over the NIC.
    tally.add("expert_near", max(0.0, inside - outside))
    tally.add("expert_far", outside)
    if layout.expert_tensor > 1:
        rounds = (4 + redo) * rows * h * size * (layout.expert_tensor - 1) / layout.expert_tensor
        tally.add("tensor", rounds / (1e9 * job.machine.bandwidth_gb_s(layout.expert_tensor)))


def layer_work(job: PlannedJob, kind: LayerKind, window: int | None, recomputed: bool) -> Vector:
    """One micro-batch through one layer on a rank, forward and backward. `recomputed`: the whole layer once more."""
    model, layout, dropped = job.model, job.layout, job.recompute.dropped
    tally, again = _Tally(job), float(recomputed)
    size, t, h = element_bytes(job), job.micro_tokens, model.hidden_size
    redo_up = 0.5 if "mla_up_proj" in dropped else 0.0
    if kind.delta:
        tally.gemms("gemm", delta_net_gemms(job), 3 + again)
        _delta_net(tally, again)
    else:
        tally.gemms("gemm", attention_gemms(job), 3 + again + redo_up)
        _attention(tally, window, again)
        _indexer(tally, again)
    _between_ranks(tally, kind, again)
    split = layout.tensor if layout.sequence else 1
    # Two norms with their residual sums, forward (5 moves of h each) and backward (twice that); once more if made again.
    norms = 10 * h / split * (3 + again + 0.5 * ("layernorm" in dropped))
    rotation = 8 * (model.attention.num_heads + arch.num_query_groups(model)) * arch.query_dim(model) / layout.tensor
    tally.memory(size * t * (norms + (0.0 if kind.delta else rotation)))
    gate = 2 if arch.is_gated(model) else 1
    width = (model.moe.shared_ffn_hidden_size or 0) if kind.moe else arch.ffn(model)
    if width:
        redo = again or float(bool({"moe", "shared_experts"} & dropped) if kind.moe else "mlp" in dropped)
        tally.gemms("gemm", mlp_gemms(job, width, t, layout.tensor), 3 + redo)
        tally.memory(size * t * (3 * gate + 2 + (gate + 1) * redo) * width / layout.tensor)
    if kind.moe:
        _experts(tally, again)
    for count in ("gaps", "kernels"):
        tally.add(count, (KERNELS_MOE if kind.moe else KERNELS_DENSE) * (1 + again / 3))
    return tally.vector


def head_work(job: PlannedJob) -> Vector:
    """Output layer and loss of one micro-batch."""
    tally, columns = _Tally(replace(job, compute="bf16") if job.compute != "fp32" else job), job.padded_vocab / job.layout.tensor
    tally.gemms("gemm", [Gemm(job.micro_tokens, job.model.hidden_size, columns)], 3)
    # fp32 logits through maximum, exponentials, sum and gradient.
    tally.memory(24.0 * job.micro_tokens * columns)
    tally.add("kernels", 20)
    return tally.vector


def stage_micro_work(job: PlannedJob) -> NDArray[np.float64]:
    """One micro-batch through all chunks of each stage, [stage, kind]."""
    cache: dict[tuple[LayerKind, int | None, bool, bool], Vector] = {}
    alike: list[Counter[tuple[LayerKind, int | None, bool, bool]]] = [Counter() for _ in range(job.layout.pipeline)]
    stages = np.zeros((job.layout.pipeline, len(KINDS)))
    recompute, windows = job.recompute, layer_cache.windows(job.model)

    wide_job, first_wide = replace(job, compute="bf16") if job.wide_layers else job, job.model.num_layers - job.wide_layers

    def layer(kind: LayerKind, window: int | None, recomputed: bool, wide: bool) -> Vector:
        key = (kind, window, recomputed, wide)
        if key not in cache:
            cache[key] = layer_work(wide_job if wide else job, kind, window, recomputed)
        return cache[key]

    for chunk in job.chunks:
        for position, index in enumerate(chunk.layers):
            again = recompute.mode == "full" and (recompute.method == "uniform" or position < recompute.num_layers)
            alike[chunk.stage][job.layer_kinds[index], windows[index], again, index >= first_wide] += 1
        if chunk.head:
            stages[chunk.stage] += head_work(job)
        if chunk.mtp:
            depth = layer(arch.mtp_kind(job.model), None, recompute.mode == "full", False) + head_work(job)
            joint = _Tally(job)
            joint.gemms("gemm", [Gemm(job.micro_tokens, 2 * job.model.hidden_size, job.model.hidden_size / job.layout.tensor)], 3)
            stages[chunk.stage] += chunk.mtp * (depth + joint.vector)
    for stage, layers in enumerate(alike):
        for like, number in layers.items():
            stages[stage] += number * layer(*like)
    if job.layout.pipeline > 1:
        size = job.micro_tokens * job.model.hidden_size * element_bytes(job)
        size /= job.layout.tensor if job.layout.sequence else 1
        span = job.layout.world_size // job.layout.pipeline + 1
        seconds = 2 * job.layout.virtual_pipeline * size / (1e9 * job.machine.bandwidth_gb_s(span))
        stages[:, INDEX["pipeline"]] += seconds
        stages[:, INDEX["passes"]] += job.layout.virtual_pipeline
    return stages
