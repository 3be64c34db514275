"""Rules of the degrees: world, tensor, sequence, pipeline, context, expert against the model. Config in, problems out.

Source: the assertions of megatron-core 0.16.1 on compute nodes (transformer_config, attention, moe_layer, schedules,
layers), checked here before anything starts.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import Problem
from configs.schema import Config
from parallel import architecture as arch
from parallel.batch import deciding_batches
from parallel.layout import sequence_parallel, world_size
from parallel.legality.rules import data_size, has_experts, near_divisors, near_multiples, on_gpu, reads

DEGREES = ("parallel.tensor", "parallel.context", "parallel.pipeline")
WORLD = ("launch.nodes", "launch.processes_per_node")


@reads(*DEGREES, *WORLD)
def degrees_divide_world(config: Config) -> Iterator[Problem]:
    """The number of ranks is a multiple of tensor x context x pipeline."""
    p, world = config.parallel, world_size(config)
    size = p.tensor * p.context * p.pipeline
    if world % size:
        yield Problem(
            "parallel",
            f"tensor {p.tensor} x context {p.context} x pipeline {p.pipeline} = {size}",
            f"must divide the world of {config.launch.nodes} x {config.launch.processes_per_node} = {world} ranks",
            f"start {near_multiples(world, size)} ranks (launch.nodes x launch.processes_per_node), or lower a degree",
        )


@reads("parallel.expert", "parallel.expert_tensor", "parallel.pipeline", *WORLD)
def expert_degrees_divide_world(config: Config) -> Iterator[Problem]:
    """The number of ranks is a multiple of expert_tensor x expert x pipeline."""
    p, world = config.parallel, world_size(config)
    size = p.expert_tensor * p.expert * p.pipeline
    if world % size:
        yield Problem(
            "parallel.expert",
            f"expert_tensor {p.expert_tensor} x expert {p.expert} x pipeline {p.pipeline} = {size}",
            f"must divide the world of {config.launch.nodes} x {config.launch.processes_per_node} = {world} ranks",
            f"start {near_multiples(world, size)} ranks, or lower parallel.expert, expert_tensor or pipeline",
        )


@reads("parallel.expert", "parallel.expert_tensor", "model.moe.num_experts")
def expert_degrees_need_experts(config: Config) -> Iterator[Problem]:
    """A dense model has expert and expert_tensor degrees of 1."""
    for name in ("expert", "expert_tensor"):
        degree = getattr(config.parallel, name)
        if degree > 1 and not has_experts(config):
            fix = f"set parallel.{name}=1, or model.moe.num_experts"
            yield Problem(f"parallel.{name}", degree, "must be 1 in a dense model (model.moe.num_experts = 0)", fix)


@reads("parallel.expert", "model.moe.num_experts")
def experts_divide(config: Config) -> Iterator[Problem]:
    """The expert degree divides the number of experts."""
    experts, degree = config.model.moe.num_experts, config.parallel.expert
    if experts and experts % degree:
        rule = f"must divide model.moe.num_experts = {experts}"
        yield Problem("parallel.expert", degree, rule, f"set parallel.expert to {near_divisors(experts, degree)}")


@reads("parallel.tensor", "model.attention")
def heads_divide(config: Config) -> Iterator[Problem]:
    """The tensor degree divides the number of query heads."""
    heads, tensor = config.model.attention.num_heads, config.parallel.tensor
    if heads % tensor:
        rule = f"must divide model.attention.num_heads = {heads}"
        yield Problem("parallel.tensor", tensor, rule, f"set parallel.tensor to {near_divisors(heads, tensor)}")


@reads("parallel.tensor", "model.attention", "model.hidden_size", "model.mla")
def query_groups_divide(config: Config) -> Iterator[Problem]:
    """The tensor degree divides the number of key/value heads, or is a multiple of it that divides the rows of their weight."""
    model, tensor = config.model, config.parallel.tensor
    groups, heads = arch.num_query_groups(model), model.attention.num_heads
    if arch.is_mla(model) or heads % tensor or heads % groups:
        return
    if groups % tensor and tensor % groups:
        rule = f"must divide model.attention.num_query_groups = {groups}, or be a multiple of it"
        yield Problem("parallel.tensor", tensor, rule, f"set parallel.tensor to {near_divisors(groups, tensor)}")
    elif tensor > groups and (rows := arch.qkv_rows(model)) % tensor:
        rule = f"with more ranks than key/value heads, must divide the {rows} rows of the query-key-value weight"
        yield Problem("parallel.tensor", tensor, rule, f"set parallel.tensor to {near_divisors(groups, tensor)}")


@reads("parallel.tensor", "model.ffn_hidden_size", "model.hidden_size", "model.moe", "model.num_layers")
def ffn_divides(config: Config) -> Iterator[Problem]:
    """The inner width of dense MLPs and of the shared expert is a multiple of the tensor degree."""
    model, tensor = config.model, config.parallel.tensor
    kinds = arch.moe_layers(model)
    if not all(kinds) and arch.ffn(model) % tensor:
        fix = f"set model.ffn_hidden_size to {near_multiples(arch.ffn(model), tensor)}"
        yield Problem("model.ffn_hidden_size", arch.ffn(model), f"must be a multiple of parallel.tensor = {tensor}", fix)
    shared = model.moe.shared_ffn_hidden_size
    if shared and any(kinds) and shared % tensor:
        fix = f"set model.moe.shared_ffn_hidden_size to {near_multiples(shared, tensor)}"
        yield Problem("model.moe.shared_ffn_hidden_size", shared, f"must be a multiple of parallel.tensor = {tensor}", fix)


@reads("parallel.expert_tensor", "model.ffn_hidden_size", "model.hidden_size", "model.moe")
def expert_ffn_divides(config: Config) -> Iterator[Problem]:
    """The expert_tensor degree divides the inner width of a routed expert."""
    degree, width = config.parallel.expert_tensor, arch.expert_ffn(config.model)
    if has_experts(config) and width % degree:
        fix = f"set parallel.expert_tensor to {near_divisors(width, degree)}"
        yield Problem("parallel.expert_tensor", degree, f"must divide an expert's inner width of {width}", fix)


@reads("parallel.tensor", "model.vocab_size", "model.vocab_multiple")
def padded_vocab_divides(config: Config) -> Iterator[Problem]:
    """The tensor degree divides the rows of the padded vocabulary."""
    model, tensor = config.model, config.parallel.tensor
    # Without a stated vocabulary any multiple may come out.
    rows = model.vocab_multiple if model.vocab_size is None else arch.padded_vocab(model, model.vocab_size)
    if rows % tensor:
        what = f"{rows} rows of the padded vocabulary" if model.vocab_size else f"model.vocab_multiple = {rows}"
        fix = f"set model.vocab_multiple to {near_multiples(model.vocab_multiple, tensor)}"
        yield Problem("parallel.tensor", tensor, f"must divide the {what}", fix)


@reads("parallel.tensor", "parallel.sequence", "model.moe.num_experts")
def sequence_needs_tensor(config: Config) -> Iterator[Problem]:
    """Sequence parallelism needs tensor parallelism, and a MoE model with tensor parallelism needs sequence parallelism."""
    p = config.parallel
    if p.sequence and p.tensor == 1:
        rule = "sequence parallelism splits the work between tensor parallel ranks: parallel.tensor = 1"
        yield Problem("parallel.sequence", True, rule, "set parallel.sequence=null, or parallel.tensor=2")
    if p.sequence is False and p.tensor > 1 and has_experts(config):
        rule = f"must be on in a MoE model with parallel.tensor = {p.tensor} (megatron-core refuses to train without)"
        yield Problem("parallel.sequence", False, rule, "set parallel.sequence=null")


@reads("parallel.tensor", "parallel.sequence", "parallel.context", "batch.seq_length_tokens")
def sequence_length_divides(config: Config) -> Iterator[Problem]:
    """The sequence length divides over context ranks (two parts each) and over tensor ranks with sequence parallelism."""
    p, length = config.parallel, config.batch.seq_length_tokens
    sequence = sequence_parallel(config)
    parts = 2 * p.context if p.context > 1 else 1
    if length % parts:
        rule = f"must be a multiple of 2 x parallel.context = {parts} (each rank holds two mirrored parts)"
        fix = f"set batch.seq_length_tokens to {near_multiples(length, parts)}"
        yield Problem("batch.seq_length_tokens", length, rule, fix)
    elif sequence and length // p.context % p.tensor:
        step = p.tensor * parts
        rule = f"must be a multiple of parallel.tensor x parallel.context = {p.tensor * p.context} with sequence parallelism"
        fix = f"set batch.seq_length_tokens to {near_multiples(length, step)}"
        yield Problem("batch.seq_length_tokens", length, rule, fix)


@reads(
    "parallel.context",
    "parallel.context_comm",
    "parallel.tensor",
    "model.attention",
    "model.mla",
    "cluster",
    "data.document_mask",
)
def context_comm_fits(config: Config) -> Iterator[Problem]:
    """The way keys and values travel between context ranks suits the heads, the attention window, sinks and document masks."""
    p, attention = config.parallel, config.model.attention
    if p.context == 1:
        return
    if p.context_comm == "a2a+p2p":
        rule = "needs a hierarchy of context groups, which is not available in this version"
        yield Problem("parallel.context_comm", p.context_comm, rule, "set parallel.context_comm to p2p, a2a or all_gather")
    if p.context_comm == "a2a":
        for name, heads in (("num_heads", attention.num_heads), ("num_query_groups", arch.num_query_groups(config.model))):
            if heads % (p.tensor * p.context) and not (name == "num_query_groups" and arch.is_mla(config.model)):
                rule = (
                    f"a2a splits heads: model.attention.{name} = {heads} must divide by tensor x context = {p.tensor * p.context}"
                )
                yield Problem("parallel.context_comm", "a2a", rule, "set parallel.context_comm=p2p")
    if on_gpu(config) and attention.window_size_tokens and p.context_comm == "p2p":
        rule = "Transformer Engine has no sliding window over a ring (model.attention.window_size_tokens is set)"
        yield Problem("parallel.context_comm", "p2p", rule, "set parallel.context_comm=all_gather")
    if on_gpu(config) and attention.sinks and p.context_comm != "a2a":
        rule = "Transformer Engine has attention sinks under context parallelism with a2a only"
        yield Problem("parallel.context_comm", p.context_comm, rule, "set parallel.context_comm=a2a, or parallel.context=1")
    if on_gpu(config) and config.data.document_mask:
        rule = "documents of any length can't be split over context parallel ranks on a GPU"
        yield Problem("data.document_mask", True, rule, "set data.document_mask=false, or parallel.context=1")


@reads("parallel.pipeline", "parallel.virtual_pipeline")
def virtual_pipeline_needs_stages(config: Config) -> Iterator[Problem]:
    """Several chunks a stage need more than one pipeline stage."""
    p = config.parallel
    if (p.virtual_pipeline or 1) > 1 and p.pipeline == 1:
        fix = "set parallel.virtual_pipeline=null, or parallel.pipeline=2"
        yield Problem("parallel.virtual_pipeline", p.virtual_pipeline, "needs more than one stage: parallel.pipeline = 1", fix)


@reads("parallel.pipeline", "parallel.virtual_pipeline", "parallel.pipeline_split", "model.num_layers")
def layers_fill_chunks(config: Config) -> Iterator[Problem]:
    """Without an explicit split every chunk gets at least one layer."""
    p, layers = config.parallel, config.model.num_layers
    chunks = p.pipeline * (p.virtual_pipeline or 1)
    if p.pipeline_split is None and layers < chunks:
        rule = f"each of the pipeline x virtual_pipeline = {chunks} chunks needs a layer: model.num_layers = {layers}"
        fix = (
            f"lower parallel.pipeline or virtual_pipeline to {layers} chunks, or state parallel.pipeline_split (0 first or last)"
        )
        yield Problem("parallel.pipeline", p.pipeline, rule, fix)


@reads("parallel.pipeline", "parallel.virtual_pipeline", "parallel.pipeline_split", "model.num_layers", "model.mtp")
def split_fits(config: Config) -> Iterator[Problem]:
    """An explicit split names every chunk, adds up to the layers, and leaves only the first or last chunk without layers."""
    p, layers, split = config.parallel, config.model.num_layers, config.parallel.pipeline_split
    chunks = p.pipeline * (p.virtual_pipeline or 1)
    if split is None:
        return
    if len(split) != chunks:
        rule = f"must name pipeline x virtual_pipeline = {chunks} chunks"
        yield Problem("parallel.pipeline_split", split, rule, f"give {chunks} numbers, or null for a balanced split")
    elif sum(split) != layers:
        rule = f"must add up to model.num_layers = {layers}, not {sum(split)}"
        yield Problem("parallel.pipeline_split", split, rule, "change the numbers, or null for a balanced split")
    elif 0 in split[1:-1] or (len(split) == 1 and split == [0]):
        rule = "only the first chunk (embedding) and the last (head) may be without layers"
        yield Problem("parallel.pipeline_split", split, rule, "give every chunk between a layer")
    elif split[-1] == 0 and config.model.mtp.num_layers:
        rule = "the last chunk needs a layer: multi-token prediction follows the last layer"
        yield Problem("parallel.pipeline_split", split, rule, "give the last chunk a layer, or set model.mtp.num_layers=0")


@reads("batch", *DEGREES, *WORLD, "parallel.virtual_pipeline")
def micro_batches_fill_interleaving(config: Config) -> Iterator[Problem]:
    """With several chunks a stage, the micro-batches of a step are a multiple of the pipeline degree."""
    p, data = config.parallel, data_size(config)
    if (p.virtual_pipeline or 1) == 1 or data is None:
        return
    at_once = config.batch.micro_batch_seqs * data
    for size in deciding_batches(config.batch):
        if size % at_once == 0 and size // at_once % p.pipeline:
            rule = (
                f"the interleaved schedule needs micro-batches in multiples of parallel.pipeline = {p.pipeline}: "
                f"{size} / (micro_batch_seqs {config.batch.micro_batch_seqs} x data {data}) = {size // at_once}"
            )
            fix = f"set batch.global_batch_seqs to {near_multiples(size, at_once * p.pipeline)}, or virtual_pipeline=null"
            yield Problem("batch.global_batch_seqs", size, rule, fix)
            return


RULES = (
    degrees_divide_world,
    expert_degrees_divide_world,
    expert_degrees_need_experts,
    experts_divide,
    heads_divide,
    query_groups_divide,
    ffn_divides,
    expert_ffn_divides,
    padded_vocab_divides,
    sequence_needs_tensor,
    sequence_length_divides,
    context_comm_fits,
    virtual_pipeline_needs_stages,
    layers_fill_chunks,
    split_fits,
    micro_batches_fill_interleaving,
)
