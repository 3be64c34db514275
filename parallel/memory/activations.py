"""Bytes that the forward pass keeps for the backward pass, per layer and per stage.

In: a PlannedJob. Out: bytes on one rank. The tensors are those that Megatron-Core with fused kernels keeps (Korthikanti et
al., arXiv 2205.05198, section 4). The paper's dropout terms are left out without dropout, its softmax terms with flash
attention. Legend: t tokens of a micro-batch on a rank, h hidden, f inner width.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel import architecture as arch
from parallel.architecture import LayerKind
from parallel.flops import gathers_keys
from parallel.memory.job import PlannedJob
from parallel.memory.layer_cache import kinds_among
from parallel.stages import Chunk

# Tokens of a chunk of flash-linear-attention's kernel.
DELTA_CHUNK_TOKENS = 64


@dataclass(frozen=True)
class ActivationDivisors:
    """Divisors of a rank's share: `tp` of tensors split over heads or width, `sp` of those split over the sequence."""

    tp: int
    sp: int


def _widths(job: PlannedJob) -> ActivationDivisors:
    layout = job.layout
    return ActivationDivisors(layout.tensor, layout.tensor if layout.sequence else 1)


def gemm_input_bytes(job: PlannedJob) -> float:
    """Bytes of one element of the input that a matrix product keeps for its weight gradient."""
    return {"fp32": 4.0, "bf16": 2.0}.get(job.compute, 1.0)


def element_bytes(job: PlannedJob) -> float:
    """Bytes of one element of the residual stream."""
    return 4.0 if job.compute == "fp32" else 2.0


def attention_bytes(job: PlannedJob) -> float:
    """Bytes per token that one layer's attention keeps on a rank: norm, query/key/value, context, softmax statistics."""
    model, w, size, kept = job.model, _widths(job), element_bytes(job), gemm_input_bytes(job)
    attention, mla, h, heads = model.attention, model.mla, model.hidden_size, model.attention.num_heads
    dropped = job.recompute.dropped
    norm = size * h / w.sp + (0.0 if "layernorm" in dropped else kept * h / w.sp)
    latent_context = 0.0
    if mla.kv_lora_rank is not None:
        compressed = 2 * (mla.q_lora_rank or 0) + 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
        up = heads * (2 * arch.query_dim(model) + arch.value_dim(model)) / w.tp
        if gathers_keys(model, job.seq_length):
            # Queries as they come and in the form of the compressed keys, which all heads share; so are the sums over values.
            up = heads * (arch.query_dim(model) + mla.kv_lora_rank + mla.qk_rope_head_dim) / w.tp
            latent_context = size * heads * mla.kv_lora_rank / w.tp
        qkv = size * (compressed + (0.0 if "mla_up_proj" in dropped else up))
    else:
        groups, width = arch.num_query_groups(model), arch.head_dim(model)
        qkv = size * arch.qkv_rows(model) / w.tp
        qkv += size * (heads + groups) * width / w.tp if attention.qk_norm else 0.0
    # The gate multiplies the context, and the product is the input of the output projection.
    context = (2 if attention.output_gate else 1) * size * heads * arch.value_dim(model) / w.tp
    scores = 4.0 * heads / w.tp
    if not job.flash and "core_attn" not in dropped:
        # The output of softmax; with dropout also the output of dropout and its mask.
        scores = heads / w.tp * job.seq_length / job.layout.context * (5.0 if attention.dropout else size)
    dropout = h / w.sp if model.hidden_dropout else 0.0
    return norm + qkv + context + latent_context + scores + indexer_bytes(job) + dropout


def indexer_bytes(job: PlannedJob) -> float:
    """Bytes per token that one layer's indexer keeps on a rank, 0 without one. No tensor parallelism divides an indexer.

    They are its queries, its key before and after the norm, the weights of its heads, and of each chosen key the index and the
    loss's gradient of its score. Under sequence parallelism its products keep their gathered inputs. The scores of all keys are
    made for a block of queries at a time, and none is kept.
    """
    model, dsa, w, size = job.model, job.model.dsa, _widths(job), element_bytes(job)
    if dsa.top_k is None:
        return 0.0
    inputs = model.hidden_size + (model.mla.q_lora_rank or 0) if w.sp > 1 else 0
    widths = (dsa.num_index_heads + 2) * dsa.index_head_dim + dsa.num_index_heads
    return size * (inputs + widths) + (4.0 + 4.0) * min(dsa.top_k, job.seq_length)


def delta_net_bytes(job: PlannedJob) -> float:
    """Bytes per token that one layer's gated delta net keeps on a rank, with flash-linear-attention's kernel.

    The kernel keeps queries and keys of every value head, and a row of a chunk's triangular matrix for each of them. It makes
    the chunks' states again in the backward pass (`state_bytes`). The norm of the output and its gate compute in fp32.
    """
    model, net, w, size, kept = job.model, job.model.delta_net, _widths(job), element_bytes(job), gemm_input_bytes(job)
    h, widths = model.hidden_size, arch.delta_widths(model)
    norm = size * h / w.sp + (0.0 if "layernorm" in job.recompute.dropped else kept * h / w.sp)
    # The convolution's input with its padding, its output, and the activated output.
    convolved = 3 * size * widths.mixed
    rule = net.num_value_heads * (size * (2 * net.key_head_dim + DELTA_CHUNK_TOKENS) + 4.0 + size)
    output = widths.value * (16.0 + size + kept)
    dropout = h / w.sp if model.hidden_dropout else 0.0
    return norm + (size * widths.projected + convolved + rule + output) / w.tp + dropout


def state_bytes(job: PlannedJob) -> float:
    """Bytes of the states and their gradients at the end of every chunk, while one gated delta net runs backward."""
    net = job.model.delta_net
    states = net.num_value_heads * net.key_head_dim * net.value_head_dim / job.layout.tensor
    return 2 * element_bytes(job) * job.micro_tokens / DELTA_CHUNK_TOKENS * states


def _mlp(job: PlannedJob, width: int, parts: float, keep_activation: bool) -> float:
    """Bytes per token of the first product's output and of the activation function's output."""
    first = element_bytes(job) * (2 if arch.is_gated(job.model) else 1) * width / parts
    return first + (gemm_input_bytes(job) * width / parts if keep_activation else 0.0)


def mlp_bytes(job: PlannedJob, is_moe: bool, imbalance: float) -> float:
    """Bytes per token that one layer's MLP or experts keep on a rank. `imbalance`: tokens of the fullest rank over the mean."""
    model, w, moe, h = job.model, _widths(job), job.model.moe, job.model.hidden_size
    dropped = job.recompute.dropped
    norm = element_bytes(job) * h / w.sp + (0.0 if "layernorm" in dropped else gemm_input_bytes(job) * h / w.sp)
    norm += h / w.sp if model.hidden_dropout else 0.0
    if not is_moe:
        return norm + (0.0 if "mlp" in dropped else _mlp(job, arch.ffn(model), w.tp, True))
    router = (4 + 4 + 1) * moe.num_experts / w.sp
    if "moe" in dropped:
        return norm + router
    etp = job.layout.expert_tensor
    copies = moe.top_k * imbalance * etp / w.tp  # routed tokens a rank works on, per token of its micro-batch
    routed = copies * (gemm_input_bytes(job) * h + _mlp(job, arch.expert_ffn(model), etp, "moe_act" not in dropped))
    shared = moe.shared_ffn_hidden_size
    has_shared = shared and "shared_experts" not in dropped
    return norm + router + routed + (_mlp(job, shared, w.tp, True) if shared and has_shared else 0.0)


def layer_bytes(job: PlannedJob, kind: LayerKind, imbalance: float) -> float:
    """Bytes of one micro-batch that one layer keeps on a rank without full recomputation."""
    mixer = delta_net_bytes(job) if kind.delta else attention_bytes(job)
    return job.micro_tokens * (mixer + mlp_bytes(job, kind.moe, imbalance))


def layer_input_bytes(job: PlannedJob) -> float:
    """Bytes of a layer's input for one micro-batch: all that full recomputation keeps."""
    return job.micro_tokens * element_bytes(job) * job.model.hidden_size / _widths(job).sp


def working_bytes(job: PlannedJob, kind: LayerKind, imbalance: float) -> float:
    """Bytes of short-lived tensors while one layer runs backward, of one micro-batch; kept activations not counted.

    They are the gradients inside its MLP, or the states of its gated delta net where those are larger.
    """
    model, w, size = job.model, _widths(job), element_bytes(job)
    gate = 2 if arch.is_gated(model) else 1
    states = state_bytes(job) if kind.delta else 0.0
    dense = 2 * model.hidden_size + (gate + 1) * arch.ffn(model) / w.tp
    if not kind.moe:
        return max(states, job.micro_tokens * size * dense)
    etp = job.layout.expert_tensor
    copies = model.moe.top_k * imbalance * etp / w.tp
    routed = copies * (2 * model.hidden_size + (gate + 1) * arch.expert_ffn(model) / etp)
    return max(states, job.micro_tokens * size * (model.hidden_size + routed))


@dataclass(frozen=True)
class KeptActivations:
    """Bytes of one micro-batch that a layer of each kind keeps, and of a layer's input."""

    by_kind: dict[LayerKind, float]
    layer_input: float


def kept_by_layer(job: PlannedJob, imbalance: float) -> KeptActivations:
    """Bytes per layer that `stage_activations` adds up, the same for all stages."""
    return KeptActivations({kind: layer_bytes(job, kind, imbalance) for kind in job.used_kinds}, layer_input_bytes(job))


def chunk_bytes(job: PlannedJob, chunk: Chunk, kept: KeptActivations) -> float:
    """Bytes that one micro-batch keeps in one chunk."""
    recompute, number = job.recompute, len(chunk.layers)
    if recompute.mode == "full" and recompute.method == "uniform":
        total = -(-number // recompute.num_layers) * kept.layer_input
    else:
        skipped = min(recompute.num_layers, number) if recompute.mode == "full" else 0
        numbers = kinds_among(job.model, chunk.layers[skipped:]).items()
        total = skipped * kept.layer_input + sum(number * kept.by_kind[kind] for kind, number in numbers)
    if chunk.mtp:
        layer = kept.by_kind[arch.mtp_kind(job.model)]
        total += chunk.mtp * ((kept.layer_input if recompute.mode == "full" else layer) + 3 * kept.layer_input)
    return total


def in_flight(job: PlannedJob, stage: int) -> int:
    """Chunk passes of a stage that wait for their backward pass when most of them wait.

    1F1B: pipeline - stage micro-batches. Interleaved: (pipeline - stage - 1)·2 + (chunks - 1)·pipeline + 1, at most all of
    them (Narayanan et al., arXiv 2104.04473; Megatron-Core's num_warmup_microbatches). parallel.overlap_expert_comm makes one
    more wait, but its forward pass runs beside the backward pass of another, which frees as much: the number stays the same.
    """
    pp, vpp = job.layout.pipeline, job.layout.virtual_pipeline
    warmup = pp - stage if vpp == 1 else (pp - stage - 1) * 2 + (vpp - 1) * pp + 1
    return min(warmup, int(-(-job.num_micro_batches // 1)) * vpp)


def stage_activations(job: PlannedJob, stage: int, kept: KeptActivations) -> float:
    """Bytes of activations that one rank of a stage keeps at the peak."""
    chunks = job.stage_chunks[stage]
    sizes = [chunk_bytes(job, chunk, kept) for chunk in chunks]
    passes, pp = in_flight(job, stage), job.layout.pipeline
    if len(chunks) == 1:
        return passes * sizes[0]
    # The schedule runs pp micro-batches through chunk 0, then through chunk 1 and so on, then the next pp micro-batches.
    rounds, left = divmod(passes, pp * len(chunks))
    return sum((rounds * pp + min(max(left - pp * chunk, 0), pp)) * size for chunk, size in enumerate(sizes))


def logit_bytes(job: PlannedJob) -> float:
    """Bytes of the logits and their loss for one micro-batch. Those of prediction depths are computed one after another."""
    return job.logit_bytes * job.micro_tokens * job.padded_vocab / job.layout.tensor
