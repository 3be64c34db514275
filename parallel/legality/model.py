"""Rules inside the `model` section: what megatron-core 0.16.1 can build, and keys that contradict each other.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import Problem
from configs.schema import Config
from parallel import architecture as arch
from parallel.legality import attention, delta_net, sparse_attention
from parallel.legality.rules import has_experts, near_divisors, near_multiples, on_gpu, reads


@reads("model.attention", "model.hidden_size", "model.mla")
def head_width(config: Config) -> Iterator[Problem]:
    """Without model.attention.head_dim the hidden size is a multiple of the number of heads."""
    model, attention = config.model, config.model.attention
    if attention.head_dim is None and not arch.is_mla(model) and model.hidden_size % attention.num_heads:
        rule = f"must be a multiple of model.attention.num_heads = {attention.num_heads} while head_dim is not stated"
        fix = f"set model.hidden_size to {near_multiples(model.hidden_size, attention.num_heads)}, or model.attention.head_dim"
        yield Problem("model.hidden_size", model.hidden_size, rule, fix)


@reads("model.attention")
def heads_in_groups(config: Config) -> Iterator[Problem]:
    """The number of key/value heads divides the number of query heads."""
    heads, groups = config.model.attention.num_heads, arch.num_query_groups(config.model)
    if heads % groups:
        rule = f"must divide model.attention.num_heads = {heads}"
        fix = f"set model.attention.num_query_groups to {near_divisors(heads, groups)}"
        yield Problem("model.attention.num_query_groups", groups, rule, fix)


@reads("model.position", "model.attention", "model.hidden_size", "model.mla")
def rotated_width_is_even(config: Config) -> Iterator[Problem]:
    """Rotary positions turn pairs of dims: the rotated width of a head is even."""
    model = config.model
    if model.position.kind != "rope":
        return
    width = model.mla.qk_rope_head_dim if arch.is_mla(model) else arch.head_dim(model) * model.position.rotary_fraction
    if width != int(width) or int(width) % 2 or width < 2:
        path = "model.mla.qk_rope_head_dim" if arch.is_mla(model) else "model.position.rotary_fraction"
        got = model.mla.qk_rope_head_dim if arch.is_mla(model) else model.position.rotary_fraction
        rule = f"positions rotate pairs: the rotated width of a head, {width:g}, must be even and at least 2"
        yield Problem(path, got, rule, "change it, or model.attention.head_dim")


@reads("model.mla", "model.attention", "model.position")
def latent_attention(config: Config) -> Iterator[Problem]:
    """Multi-head latent attention excludes keys of ordinary attention; its own keys need kv_lora_rank."""
    model, attention, position = config.model, config.model.attention, config.model.position
    if not arch.is_mla(model):
        if model.mla.q_lora_rank is not None:
            rule = "needs model.mla.kv_lora_rank, which switches latent attention on"
            yield Problem("model.mla.q_lora_rank", model.mla.q_lora_rank, rule, "set model.mla.kv_lora_rank, or q_lora_rank=null")
        return
    wanted: tuple[tuple[str, object, object, str], ...] = (
        ("attention.num_query_groups", attention.num_query_groups, (None, attention.num_heads), "every head has its own key"),
        ("attention.head_dim", attention.head_dim, (None,), "the widths of a head are model.mla's"),
        ("attention.qk_norm", attention.qk_norm, (False,), "its compressed queries and keys always have their own norms"),
        ("attention.qk_l2_norm", attention.qk_l2_norm, (False,), "its compressed queries and keys always have their own norms"),
        ("attention.temperature_growth", attention.temperature_growth, (0.0,), "all of its layers are rotated"),
        ("attention.window_kind", attention.window_kind, ("sliding",), "chunks were never held to be right there"),
        ("attention.qkv_bias", attention.qkv_bias, (False,), "megatron-core has no bias there"),
        ("attention.sinks", attention.sinks, (False,), "megatron-core has no sinks there"),
        ("position.kind", position.kind, ("rope",), "a part of each key is rotated"),
        ("position.rotary_fraction", position.rotary_fraction, (1.0,), "the rotated width is model.mla.qk_rope_head_dim"),
        ("position.interleaved", position.interleaved, (False,), "megatron-core orders the rotated part itself"),
        ("position.scaling.kind", position.scaling.kind, ("none", "yarn"), "megatron-core has rope and yarn there"),
    )
    for name, got, allowed, why in wanted:
        if got not in allowed:  # type: ignore[operator]
            rule = f"must be {' or '.join(str(value) for value in allowed)} with latent attention: {why}"  # type: ignore[attr-defined]
            yield Problem(f"model.{name}", got, rule, f"leave model.{name} out, or set model.mla.kv_lora_rank=null")


@reads("model.position", "model.mla", "model.attention", "model.num_layers")
def rope_scaling(config: Config) -> Iterator[Problem]:
    """Scaling of rotary positions needs rotary positions, and the values that megatron-core fixes for its kind."""
    position, scaling = config.model.position, config.model.position.scaling
    if scaling.kind == "none":
        if scaling.factor != 1.0:
            fix = "set model.position.scaling.kind to linear, llama3 or yarn, or factor=1"
            yield Problem("model.position.scaling.factor", scaling.factor, "has no effect while scaling.kind = none", fix)
        return
    pattern = config.model.attention.window_pattern
    # Another rule wants the pattern to name every layer.
    layers = range(config.model.num_layers if pattern is None else len(pattern))
    windows = {arch.window_of_layer(config.model, layer) is not None for layer in layers}
    if scaling.layers == "full_attention" and (windows != {True, False} or arch.is_mla(config.model)):
        rule = "needs layers with and without a window (model.attention), and no latent attention"
        yield Problem("model.position.scaling.layers", scaling.layers, rule, "set model.position.scaling.layers=all")
    if position.kind != "rope":
        rule = f"stretches rotary positions: model.position.kind = {position.kind}"
        yield Problem("model.position.scaling.kind", scaling.kind, rule, "set model.position.scaling.kind=none")
    if scaling.kind == "yarn" and position.interleaved:
        rule = "megatron-core's yarn rotates halves, not neighbouring pairs"
        yield Problem("model.position.interleaved", True, rule, "set model.position.interleaved=false")
    if scaling.kind == "llama3" and scaling.low_freq_factor > scaling.high_freq_factor:
        rule = f"must be at most high_freq_factor = {scaling.high_freq_factor:g}"
        yield Problem("model.position.scaling.low_freq_factor", scaling.low_freq_factor, rule, "lower it")


@reads("model.max_position_tokens", "batch.seq_length_tokens")
def positions_cover_sequence(config: Config) -> Iterator[Problem]:
    """A training sequence is at most as long as model.max_position_tokens."""
    longest, length = config.model.max_position_tokens, config.batch.seq_length_tokens
    if longest is not None and length > longest:
        rule = f"must be at most model.max_position_tokens = {longest}"
        yield Problem("batch.seq_length_tokens", length, rule, f"set batch.seq_length_tokens={longest}, or raise the other")


@reads("model.mlp_bias", "model.attention", "model.moe.router.bias", "model.moe.num_experts", "model.mla")
def biases_go_together(config: Config) -> Iterator[Problem]:
    """Biases of the output projection, the router and query/key/value follow model.mlp_bias: megatron-core has one switch."""
    model, attention = config.model, config.model.attention
    together = [("attention.output_bias", attention.output_bias)]
    together += [("moe.router.bias", model.moe.router.bias)] if has_experts(config) else []
    for name, value in together:
        if value != model.mlp_bias:
            rule = f"must equal model.mlp_bias = {model.mlp_bias}: megatron-core has one switch for the biases of all products"
            yield Problem(f"model.{name}", value, rule, f"set model.{name}={str(model.mlp_bias).lower()}")
    if model.mlp_bias and not attention.qkv_bias and not arch.is_mla(model):
        rule = "must be on with model.mlp_bias: megatron-core has one switch for the biases of all products"
        yield Problem("model.attention.qkv_bias", False, rule, "set model.attention.qkv_bias=true")


@reads("model.mtp", "model.position.kind")
def prediction_depths(config: Config) -> Iterator[Problem]:
    """Multi-token prediction excludes learned positions."""
    depths, kind = config.model.mtp.num_layers, config.model.position.kind
    if depths and kind == "learned":
        rule = "multi-token prediction needs rotary positions or none, not learned ones"
        yield Problem("model.mtp.num_layers", depths, rule, "set model.mtp.num_layers=0, or model.position.kind=rope")


@reads("model.position.kind", "model.max_position_tokens", "batch.seq_length_tokens")
def learned_positions_are_counted(config: Config) -> Iterator[Problem]:
    """Learned positions are a weight, whose rows model.max_position_tokens states."""
    if config.model.position.kind == "learned" and config.model.max_position_tokens is None:
        length = config.batch.seq_length_tokens
        rule = "learned positions are a weight with a row for each position, whose number must be stated: it can't change later"
        yield Problem("model.max_position_tokens", None, rule, f"set model.max_position_tokens={length} or more")


@reads("model.norm_position", "model.mla", "model.delta_net", "model.mtp")
def post_norms_fit(config: Config) -> Iterator[Problem]:
    """model.norm_position = after needs ordinary attention in every layer, and excludes multi-token prediction."""
    path, model = "model.norm_position", config.model
    if model.norm_position == "after" and (arch.is_mla(model) or arch.has_delta_net(model)):
        rule = "after needs ordinary attention in every layer: others were never held to be right with it"
        yield Problem(path, "after", rule, f"set {path}=before")
    if model.norm_position == "after" and model.mtp.num_layers:
        rule = "after excludes multi-token prediction: megatron-core builds its depths from layers with norms before only"
        yield Problem(path, "after", rule, f"set {path}=before, or model.mtp.num_layers=0")


@reads("model.mla", "model.norm_eps", "cluster")
def latent_norm_epsilon(config: Config) -> Iterator[Problem]:
    """On GPUs the norms of latent attention have the epsilon of all other norms."""
    own = config.model.mla.norm_eps
    if arch.is_mla(config.model) and on_gpu(config) and own is not None and own != config.model.norm_eps:
        rule = f"must be model.norm_eps = {config.model.norm_eps:g} on GPUs: Transformer Engine's fused norms have one epsilon"
        yield Problem("model.mla.norm_eps", own, rule, "leave model.mla.norm_eps out, or train on CPUs")


RULES = (
    *sparse_attention.RULES,
    latent_norm_epsilon,
    head_width,
    heads_in_groups,
    rotated_width_is_even,
    latent_attention,
    rope_scaling,
    positions_cover_sequence,
    biases_go_together,
    prediction_depths,
    learned_positions_are_counted,
    post_norms_fit,
    *attention.RULES,
    *delta_net.RULES,
)
