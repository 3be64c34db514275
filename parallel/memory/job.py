"""Everything that the memory and time of a training step depend on: model, layout, batch, number formats and machine.

In: a checked Config. Out: a frozen `PlannedJob`. tools/planner/published/row.py makes the same value of a published run.
`compute` is the number format of the matrix products: fp32, bf16, fp8 or fp4.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from configs.optimizer_schema import Optimizer
from configs.schema import Config, Recompute
from parallel import architecture as arch
from parallel.architecture import LayerKind
from parallel.batch import num_micro_batches
from parallel.layout import Layout, make_layout
from parallel.memory import layer_cache
from parallel.memory.hardware import PlannedMachine, make_machine
from parallel.stages import Chunk

# Bytes of one logit with Megatron-Core's vocabulary parallel cross entropy: bf16, and an fp32 probability that the gradient
# overwrites.
LOGIT_BYTES = 6.0
# Bytes of one logit where the output layer gathers them: bf16, an fp32 copy and the gradient in bf16.
GATHERED_LOGIT_BYTES = 8.0
# Bytes of one logit with a cross entropy that torch.compile fuses: the logit and its gradient, both bf16.
COMPILED_LOGIT_BYTES = 4.0
# Bytes of one logit with PyTorch's uncompiled cross entropy: the logit, its log-softmax and the gradient, all fp32.
EAGER_LOGIT_BYTES = 12.0


@dataclass(frozen=True)
class BytesPerParameter:
    """Bytes of one parameter: its weight in the products, its accumulated gradient, its optimizer state with main weight.

    `optimizer` is that of AdamW; Muon keeps `moment` bytes less.
    """

    weights: int = 2
    gradients: int = 4
    optimizer: int = 12
    moment: int = 4


@dataclass(frozen=True)
class ZeroSharding:
    """How data parallel ranks divide weights, gradients and optimizer state (ZeRO, arXiv 1910.02054).

    `engine`: megatron, deepspeed, fsdp (PyTorch's first one) or fsdp2. `group`: number of data parallel ranks over which states
    are divided; None: all.
    `overlap`: gradients are reduced while the backward pass runs. `each_pass`: gradients are reduced and divided after every
    micro-batch instead of once a step, from stage 1 on, as our DeepSpeed engine does.
    """

    engine: str = "megatron"
    stage: int = 1
    offload: str = "none"
    group: int | None = None
    overlap: bool = True
    each_pass: bool = False


@dataclass(frozen=True)
class Recomputation:
    """Activations computed again in the backward pass: configs.schema.Recompute as a frozen value."""

    mode: str = "none"
    modules: frozenset[str] = frozenset()
    method: str = "uniform"
    num_layers: int = 1

    @property
    def dropped(self) -> frozenset[str]:
        """Modules whose activations are dropped and recomputed; empty unless mode is selective."""
        return self.modules if self.mode == "selective" else frozenset()


@dataclass(frozen=True)
class PlannedJob:
    """Everything that memory and time depend on. Sequence lengths in tokens, batches in sequences.

    `flash`: attention keeps no score matrix. `tensor_waits`: matrix products wait for tensor parallel traffic, which does not
    overlap with them. `expert_overlap`: tokens are sent to their experts while another micro-batch computes; None: a published
    run, which overlaps where its schedule allows. `dispatcher`: how tokens reach their experts. alltoall sends a token once for
    each of its experts; flex (DeepEP, HybridEP) once to each rank that has some of them, and once over the NIC to each scale-up
    domain that has; allgather to every rank of the group. `eager`: PyTorch's own elementwise
    kernels, neither compiled nor Transformer Engine's. `early_flash`: the first flash attention that ran on the GPU: version 1 on
    A100, version 2 on Hopper.
    `grouped_launch`: one kernel computes the products of all local experts, in place of one for each expert.
    `casts_apart`: an operand is cast for each of its products by itself, as torchao does with scales by row or block.
    `experts_only`: only the routed experts' products are in `compute`, others in bf16. `wide_layers`: so many of the last layers
    have all their products in bf16.
    """

    model: Model
    vocab: int
    layout: Layout
    machine: PlannedMachine
    seq_length: int
    micro_batch: int
    global_batch: int
    states: BytesPerParameter = BytesPerParameter()
    zero: ZeroSharding = ZeroSharding()
    recompute: Recomputation = Recomputation()
    compute: str = "bf16"
    flash: bool = True
    tensor_waits: bool = False
    expert_overlap: bool | None = None
    dispatcher: str = "alltoall"
    eager: bool = False
    early_flash: bool = False
    grouped_launch: bool = False
    casts_apart: bool = False
    experts_only: bool = False
    wide_layers: int = 0
    split: tuple[int, ...] | None = None
    logit_bytes: float = LOGIT_BYTES
    optimizer: Optimizer = field(default_factory=Optimizer)

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """Layers of each stage and chunk."""
        return layer_cache.chunks_of(self.model, self.vocab, self.layout.pipeline, self.layout.virtual_pipeline, self.split)

    @cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return layer_cache.layer_kinds(self.model)

    @cached_property
    def used_kinds(self) -> frozenset[LayerKind]:
        """The kinds of the layers and of the prediction depths."""
        return frozenset(self.layer_kinds) | ({arch.mtp_kind(self.model)} if self.model.mtp.num_layers else frozenset())

    @cached_property
    def stage_chunks(self) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks of each stage."""
        return tuple(self.chunks[stage :: self.layout.pipeline] for stage in range(self.layout.pipeline))

    @cached_property
    def padded_vocab(self) -> int:
        return arch.padded_vocab(self.model, self.vocab)

    @property
    def num_micro_batches(self) -> float:
        """Micro-batches of one rank in a step; a fraction when the batch of a published run does not divide."""
        return max(1.0, self.global_batch / (self.micro_batch * self.layout.data))

    @property
    def micro_tokens(self) -> float:
        """Tokens of one micro-batch on one context parallel rank."""
        return self.micro_batch * self.seq_length / self.layout.context

    @property
    def step_tokens(self) -> int:
        return self.global_batch * self.seq_length

    @property
    def hides_experts(self) -> bool:
        """Whether sending tokens to experts overlaps with computation: Megatron-Core's overlap_moe_expert_parallel_comm.

        With a pipeline it needs virtual chunks, and it excludes full recomputation.
        """
        if self.expert_overlap is not None:
            return self.expert_overlap
        return self.layout.pipeline > 1 and self.layout.virtual_pipeline > 1 and self.recompute.mode != "full"

    @property
    def sends_once(self) -> bool:
        """Whether a token travels at most once to each rank."""
        return self.dispatcher == "flex"

    @property
    def shards_weights(self) -> bool:
        """ZeRO-3: weights are gathered for each layer's pass."""
        return self.zero.stage == 3

    @property
    def shards_gradients(self) -> bool:
        """ZeRO-2, or stage 1 with a reduction after every micro-batch: a rank keeps only its own part of the gradients."""
        return self.zero.stage >= 2 or (self.zero.stage == 1 and self.zero.each_pass)

    @property
    def whole_gradients(self) -> bool:
        """Whether accumulated gradients stay whole: FSDP2 reduces and divides them after the last micro-batch only."""
        return self.zero.engine == "fsdp2" and self.num_micro_batches > 1

    def shard(self, data: int) -> int:
        """Number of ranks over which ZeRO divides states, out of `data` ranks that would hold the same states without it."""
        return min(self.zero.group or data, data) if self.zero.stage else 1


def states_of(config: Config) -> BytesPerParameter:
    """Bytes of one parameter. bf16 weights have an fp32 main weight beside two fp32 moments; fp32 weights need no main weight."""
    if config.precision.params == "fp32":
        return BytesPerParameter(4, 4, 8)
    return BytesPerParameter(2, 2 if config.precision.grads == "bf16" else 4, 12)


def compute_of(config: Config) -> str:
    """Number format of the matrix products: fp32, bf16 or fp8."""
    return "fp8" if config.precision.fp8 != "none" else config.precision.params


def recomputation_of(section: Recompute) -> Recomputation:
    """The `recompute` section as a frozen value."""
    return Recomputation(section.mode, frozenset(section.modules), section.method, section.num_layers)


def make_job(config: Config, vocab_size: int | None, machine: PlannedMachine | None = None) -> PlannedJob:
    """The job of a legal config. Raises ConfigError when the vocabulary size or the GPU is not known."""
    if vocab_size is None:
        rule = "the planner needs the number of tokens: no tokenizer could be read"
        raise ConfigError(Problem("model.vocab_size", None, rule, "set model.vocab_size"))
    batch, layout = config.batch, make_layout(config)
    # Asserts that the batch divides: a legal config's does.
    num_micro_batches(batch, layout.data, batch.global_batch_seqs)
    zero = config.zero
    return PlannedJob(
        model=config.model,
        vocab=vocab_size,
        layout=layout,
        machine=machine or make_machine(config),
        seq_length=batch.seq_length_tokens,
        micro_batch=batch.micro_batch_seqs,
        global_batch=batch.global_batch_seqs,
        states=states_of(config),
        zero=ZeroSharding(zero.engine, zero.stage, zero.offload, None, zero.overlap_grad_reduce, zero.engine == "deepspeed"),
        recompute=recomputation_of(config.recompute),
        expert_overlap=config.parallel.overlap_expert_comm,
        dispatcher=config.model.moe.dispatcher,
        compute=compute_of(config),
        tensor_waits=layout.tensor > 1,
        optimizer=config.optimizer,
        split=tuple(config.parallel.pipeline_split) if config.parallel.pipeline_split else None,
    )
