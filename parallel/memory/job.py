"""One training job as the planner sees it: model, layout, batch, numbers and machine.

In: a checked Config (or a published row, see rows.py). Out: a frozen `Job`, from which memory and time follow.
`compute` is the number format of the products: fp32, bf16, fp8 or fp4.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from configs.schema import Config, Recompute
from parallel import architecture as arch
from parallel.batch import num_micro_batches
from parallel.layout import Layout, make_layout
from parallel.memory import layers as facts
from parallel.memory.hardware import Machine, make_machine
from parallel.stages import Chunk

# Of one logit: bf16, and fp32 probabilities that its gradient overwrites (vocabulary parallel cross entropy).
LOGIT_BYTES = 6.0
# PyTorch's own cross entropy, not compiled: fp32 logits, their log-softmax and its gradient besides.
EAGER_LOGIT_BYTES = 12.0


@dataclass(frozen=True)
class States:
    """Bytes of one parameter: `weights` as multiplied, `gradients` as accumulated, `optimizer` with main weights."""

    weights: int = 2
    gradients: int = 4
    optimizer: int = 12


@dataclass(frozen=True)
class Zero:
    """Who shards what. `group`: data parallel ranks that share the shards, None for all. `engine`: megatron, deepspeed, fsdp.

    `each_pass`: gradients are reduced and divided after every micro-batch, from stage 1 on (our DeepSpeed engine), instead of
    once a step.
    """

    engine: str = "megatron"
    stage: int = 1
    offload: str = "none"
    group: int | None = None
    overlap: bool = True
    each_pass: bool = False


@dataclass(frozen=True)
class Recomputation:
    """Activations made again in the backward pass, as configs.schema.Recompute."""

    mode: str = "none"
    modules: frozenset[str] = frozenset()
    method: str = "uniform"
    num_layers: int = 1

    @property
    def dropped(self) -> frozenset[str]:
        """Modules recomputed one by one; empty unless selective."""
        return self.modules if self.mode == "selective" else frozenset()


@dataclass(frozen=True)
class Job:
    """Everything that memory and time depend on. Lengths in tokens.

    `flash`: attention keeps no score matrix. `tensor_waits`: products wait for tensor parallel traffic, which is not cut up and
    sent beside them. `expert_overlap`: tokens travel to their experts while another micro-batch computes; None: a
    published run, which does so where the schedule allows it. `sends_once`: a token travels once to each rank, and once over
    the NIC to each domain, that has experts of it (the flex dispatcher: DeepEP, HybridEP), instead of once for each expert.
    """

    model: Model
    vocab: int
    layout: Layout
    machine: Machine
    seq_length: int
    micro_batch: int
    global_batch: int
    states: States = States()
    zero: Zero = Zero()
    recompute: Recomputation = Recomputation()
    compute: str = "bf16"
    flash: bool = True
    tensor_waits: bool = False
    expert_overlap: bool | None = None
    sends_once: bool = False
    split: tuple[int, ...] | None = None
    logit_bytes: float = LOGIT_BYTES

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """Layers of each stage and chunk."""
        return facts.chunks_of(self.model, self.vocab, self.layout.pipeline, self.layout.virtual_pipeline, self.split)

    @cached_property
    def moe_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it is a MoE layer."""
        return facts.moe_layers(self.model)

    @cached_property
    def stage_chunks(self) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks of each stage."""
        return tuple(self.chunks[stage :: self.layout.pipeline] for stage in range(self.layout.pipeline))

    @cached_property
    def padded_vocab(self) -> int:
        return arch.padded_vocab(self.model, self.vocab)

    @property
    def num_micro_batches(self) -> float:
        """Micro-batches of one rank in a step; a fraction where a published batch doesn't divide."""
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
        """Whether tokens travel to experts behind computation (Megatron-Core's overlap_moe_expert_parallel_comm: with a pipeline
        it needs virtual chunks, and no full recomputation)."""
        if self.expert_overlap is not None:
            return self.expert_overlap
        return self.layout.pipeline > 1 and self.layout.virtual_pipeline > 1 and self.recompute.mode != "full"

    @property
    def shards_weights(self) -> bool:
        """ZeRO-3: weights are gathered for each layer's pass."""
        return self.zero.stage == 3

    @property
    def shards_gradients(self) -> bool:
        """ZeRO-2, or a stage 1 that reduces after every micro-batch: it keeps only its own part, too."""
        return self.zero.stage >= 2 or (self.zero.stage == 1 and self.zero.each_pass)

    def shard(self, data: int) -> int:
        """Ranks over which ZeRO divides states that `data` ranks hold alike."""
        return min(self.zero.group or data, data) if self.zero.stage else 1


def states_of(config: Config) -> States:
    """Bytes a parameter: bf16 weights have fp32 main weights beside two fp32 moments; fp32 weights are their own."""
    if config.precision.params == "fp32":
        return States(4, 4, 8)
    return States(2, 2 if config.precision.grads == "bf16" else 4, 12)


def compute_of(config: Config) -> str:
    """Number format of the products."""
    return "fp8" if config.precision.fp8 != "none" else config.precision.params


def recomputation_of(section: Recompute) -> Recomputation:
    """The config's section as a job's."""
    return Recomputation(section.mode, frozenset(section.modules), section.method, section.num_layers)


def make_job(config: Config, vocab_size: int | None, machine: Machine | None = None) -> Job:
    """The job of a legal config. Raises ConfigError when the vocabulary or the GPU is not known."""
    if vocab_size is None:
        rule = "the planner needs the number of tokens: no tokenizer could be read"
        raise ConfigError(Problem("model.vocab_size", None, rule, "set model.vocab_size"))
    batch, layout = config.batch, make_layout(config)
    # Divides, or the checks were passed over: an assertion is ours.
    num_micro_batches(batch, layout.data, batch.global_batch_seqs)
    zero = config.zero
    return Job(
        model=config.model,
        vocab=vocab_size,
        layout=layout,
        machine=machine or make_machine(config),
        seq_length=batch.seq_length_tokens,
        micro_batch=batch.micro_batch_seqs,
        global_batch=batch.global_batch_seqs,
        states=states_of(config),
        zero=Zero(zero.engine, zero.stage, zero.offload, None, zero.overlap_grad_reduce, zero.engine == "deepspeed"),
        recompute=recomputation_of(config.recompute),
        expert_overlap=config.parallel.overlap_expert_comm,
        sends_once=config.model.moe.dispatcher == "flex",
        compute=compute_of(config),
        split=tuple(config.parallel.pipeline_split) if config.parallel.pipeline_split else None,
    )
