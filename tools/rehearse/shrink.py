"""A config of any size -> a config that CPUs train in a second, with the same kind of model, switches and axes.

In: a whole Config. Out: a Config of at most 16 ranks. Every axis that was larger than 1 is still larger than 1. Widths are
small and pairwise different, so that a transposed or swapped tensor is noticed.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import lcm

from configs.model_schema import Model
from configs.schema import BatchRamp, Config, Precision
from parallel.architecture import has_delta_net, is_mla, num_query_groups
from parallel.layout import make_layout, world_size

MAX_RANKS = 16
VOCAB_SIZE = 300
# A threshold that most heads of the small model exceed.
QK_CLIP = 0.3


@dataclass(frozen=True)
class CommonDivisors:
    """What the widths, experts and batch of the small model must be divisible by, so that all layouts of one rehearsal train the
    same model on the same batches.
    """

    tensor: int
    expert: int
    expert_tensor: int
    context: int
    chunks: int
    batch: int


def fit_degrees(config: Config) -> Config:
    """The layout on at most 16 ranks: unchanged when it fits, else each axis above 1 becomes 2. So does a larger micro-batch.

    The data axes follow from the number of ranks: the smallest number that keeps both above 1 where they were. When 16 ranks
    are too few for that, the experts' data axis becomes 1 first.
    """
    config = deepcopy(config)
    parallel, launch = config.parallel, config.launch
    world = world_size(config)
    launch.nodes = 1
    launch.processes_per_node = world
    config.batch.micro_batch_seqs = min(config.batch.micro_batch_seqs, 2)
    if world <= MAX_RANKS:
        return config
    attention = parallel.tensor * parallel.context * parallel.pipeline
    experts = parallel.expert_tensor * parallel.expert * parallel.pipeline
    data, expert_data = world // attention > 1, world // experts > 1
    for axis in ("tensor", "context", "pipeline", "expert", "expert_tensor"):
        setattr(parallel, axis, min(getattr(parallel, axis), 2))
    if parallel.virtual_pipeline:
        parallel.virtual_pipeline = min(parallel.virtual_pipeline, 2)
    parallel.pipeline_split = None
    launch.processes_per_node = _smallest_world(config, data, expert_data)
    return config


def _smallest_world(config: Config, data: bool, expert_data: bool) -> int:
    """The smallest number of ranks that the axes allow, with data axes above 1 where `data` and `expert_data` ask for it."""
    parallel = config.parallel
    attention = parallel.tensor * parallel.context * parallel.pipeline
    experts = parallel.expert_tensor * parallel.expert * parallel.pipeline
    step = lcm(attention, experts)
    for keep_experts in (expert_data, False):
        for world in range(step, MAX_RANKS + 1, step):
            if (world // attention > 1) >= data and (world // experts > 1) >= keep_experts:
                return world
    return step


def common_divisors(configs: Sequence[Config]) -> CommonDivisors:
    """The smallest divisors that fit all these layouts and their micro-batches."""
    layouts = [make_layout(config) for config in configs]
    rounds = [layout.data * (layout.pipeline if layout.virtual_pipeline > 1 else 1) for layout in layouts]
    return CommonDivisors(
        tensor=lcm(*(layout.tensor for layout in layouts)),
        expert=lcm(*(layout.expert for layout in layouts)),
        expert_tensor=lcm(*(layout.expert_tensor for layout in layouts)),
        context=lcm(*(layout.context for layout in layouts)),
        chunks=max(layout.pipeline * layout.virtual_pipeline for layout in layouts),
        batch=lcm(4, *(config.batch.micro_batch_seqs * count for config, count in zip(configs, rounds, strict=True))),
    )


def shrink(config: Config, common: CommonDivisors) -> Config:
    """The small model on the degrees of `config`. Random parts of training are off, since they depend on the layout by design."""
    small = deepcopy(config)
    small.model = shrink_model(config.model, common)
    small.run.steps, small.run.tokens = 3, None
    small.precision = Precision(params="fp32", grads="fp32")
    batch = small.batch
    batch.global_batch_seqs = common.batch
    batch.seq_length_tokens = max(16, 4 * 2 * common.context * common.tensor)
    small.model.max_position_tokens = batch.seq_length_tokens if config.model.position.kind == "learned" else None
    batch.ramp = BatchRamp()
    small.schedule.horizon_steps, small.schedule.warmup_steps = None, 0
    # Without an epsilon above the rounding noise, Adam would turn the noise of a vanishing gradient into full steps.
    small.optimizer.lr, small.optimizer.eps, small.schedule.min_lr = 3e-3, 1e-5, 0.0
    # In bf16 the iterations of two layouts differ by 6e-4, and a wrong update could hide in that.
    small.optimizer.muon.ns_dtype = "fp32"
    if small.optimizer.muon.qk_clip is not None:
        small.optimizer.muon.qk_clip = QK_CLIP
    small.cluster.device, small.cluster.gpu = "auto", None
    if needs_gpu_dispatcher(config):
        small.model.moe.dispatcher = "alltoall"
    small.zero.overlap_grad_reduce = small.zero.overlap_param_gather = False
    small.checkpoint.resume_step = small.checkpoint.load = None
    return small


def needs_gpu_dispatcher(config: Config) -> bool:
    """Whether the run's dispatcher is for GPUs only. A rehearsal sends the same tokens by all-to-all."""
    return config.model.moe.num_experts > 0 and config.model.moe.dispatcher == "flex"


def replaced_precision(config: Config) -> dict[str, str]:
    """Keys of `precision` that a rehearsal replaces with fp32, with the run's values.

    In bf16 the same sums in another order differ by 1e-3, and a wrong gradient could hide in that.
    """
    precision = config.precision
    used = {"precision.params": precision.params, "precision.grads": precision.grads, "precision.fp8": precision.fp8}
    return {path: value for path, value in used.items() if value not in ("fp32", "none")}


def omitted_features(model: Model) -> list[str]:
    """Keys of the features that `shrink` turns off: they depend on which tokens share a rank, or on the order of tokens."""
    router = model.moe.router
    has_experts = model.moe.num_experts > 0
    used = {
        "model.hidden_dropout": model.hidden_dropout > 0,
        "model.attention.dropout": model.attention.dropout > 0,
        "model.moe.capacity_factor": has_experts and model.moe.capacity_factor is not None,
        "model.moe.router.jitter_eps": has_experts and router.jitter_eps > 0,
    }
    return [path for path, value in used.items() if value]


def shrink_model(model: Model, common: CommonDivisors) -> Model:
    """The model with small, pairwise different widths. The pattern of layers, the router and every switch stay."""
    small = deepcopy(model)
    tensor = common.tensor
    small.vocab_size, small.vocab_multiple = VOCAB_SIZE, 8 * tensor
    small.hidden_size, small.ffn_hidden_size = 40, 56 * tensor
    if base := model.mup.base_hidden_size:
        # The multiple of the width stays, and with it the learning rates.
        small.mup.base_hidden_size = max(1, round(small.hidden_size * base / model.hidden_size))
    small.max_position_tokens = None
    small.init_std, small.hidden_dropout = 0.1, 0.0
    _shrink_attention(small, model, tensor)
    _shrink_delta_net(small, model, tensor * common.context)
    _shrink_experts(small, model, common)
    small.num_layers = max(common.chunks, 2, small.moe.first_dense_layers + 1)
    small.moe.layer_pattern = _first_of(model.moe.layer_pattern, small.num_layers)
    small.attention.window_pattern = _first_of(model.attention.window_pattern, small.num_layers)
    small.position.layer_pattern = _first_of(model.position.layer_pattern, small.num_layers)
    small.delta_net.pattern = _first_of(model.delta_net.pattern, small.num_layers)
    small.mtp.num_layers = min(model.mtp.num_layers, 2)
    return small


def _first_of(pattern: list[int] | None, layers: int) -> list[int] | None:
    """The first layers of the pattern. Both kinds of layers stay where there were both."""
    if pattern is None:
        return None
    kinds = [pattern[layer % len(pattern)] for layer in range(layers)]
    missing = set(pattern) - set(kinds)
    return [*kinds[: layers - len(missing)], *missing]


def _shrink_attention(small: Model, model: Model, tensor: int) -> None:
    attention, groups = small.attention, num_query_groups(model)
    attention.dropout = 0.0
    if groups == model.attention.num_heads:
        attention.num_heads, attention.num_query_groups = 2 * tensor, None
    else:
        attention.num_query_groups = 1 if groups == 1 else max(tensor, 2)
        attention.num_heads = 2 * max(attention.num_query_groups, tensor)
    plain_head_dim = 16 if model.position.rotary_fraction < 1 else 12
    attention.head_dim = None if is_mla(model) else plain_head_dim
    if attention.window_size_tokens is not None:
        attention.window_size_tokens = 5
    attention.temperature_step_tokens = min(attention.temperature_step_tokens, 3)
    if is_mla(model):
        mla = small.mla
        mla.kv_lora_rank, mla.q_lora_rank = 16, (20 if mla.q_lora_rank else None)
        mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim = 12, 8, 10


def _shrink_delta_net(small: Model, model: Model, parts: int) -> None:
    """As many value heads for each key head as before, up to three. `parts`: ranks that share the heads."""
    net = small.delta_net
    if not has_delta_net(model):
        return
    # A value head's output is normed, and is almost 0 while its state is small, so a small epsilon makes rounding grow. The
    # gradient norm of one process whose initial weights change by 1e-7 differs after 3 steps by 4e-3 at an epsilon of 1e-6, 1e-5
    # at 1e-5, 1e-6 at 1e-4 and 4e-7 at 1e-3; without gated delta nets by 2e-7. Below 1e-4 no layout could be told from that. The
    # gradients of the first step differ by less than 1e-4 in every layout at 1e-6 too.
    small.norm_eps = 1e-3
    ratio = min(model.delta_net.num_value_heads // model.delta_net.num_key_heads, 3)
    net.num_key_heads = 2 * parts
    net.num_value_heads = ratio * net.num_key_heads
    net.key_head_dim, net.value_head_dim = 14, 11


def _shrink_experts(small: Model, model: Model, common: CommonDivisors) -> None:
    moe = small.moe
    if not model.moe.num_experts:
        return
    grouped = moe.router.num_groups is not None
    moe.num_experts = common.expert * (4 if common.expert == 1 or grouped else 2)
    moe.top_k = min(moe.top_k, 2)
    if grouped:
        moe.router.num_groups, moe.router.group_top_k = 2, 1
        # Groups of 2 x common.expert experts.
        moe.router.group_score_experts = min(moe.router.group_score_experts or 0, 2) or None
    moe.ffn_hidden_size = 24 * common.expert_tensor
    moe.shared_ffn_hidden_size = 36 * common.tensor if moe.shared_ffn_hidden_size else None
    moe.first_dense_layers = min(moe.first_dense_layers, 1)
    moe.layer_frequency = min(moe.layer_frequency, 2)
    moe.capacity_factor, moe.pad_to_capacity, moe.router.jitter_eps = None, False, 0.0
