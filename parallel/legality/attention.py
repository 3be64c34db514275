"""Rules on the layers of attention: windows, norms of queries and keys, and positions layer by layer.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import Problem
from configs.schema import Config
from parallel import architecture as arch
from parallel.legality.rules import on_gpu, reads


@reads("model.attention", "model.num_layers", "model.mtp")
def window_pattern_fits(config: Config) -> Iterator[Problem]:
    """model.attention.window_pattern names every layer, needs a window size, and excludes multi-token prediction."""
    attention, layers = config.model.attention, config.model.num_layers
    path, pattern = "model.attention.window_pattern", attention.window_pattern
    if pattern is None:
        return
    if len(pattern) != layers:
        rule = f"must name each of the model.num_layers = {layers} layers, not {len(pattern)}"
        yield Problem(path, pattern, rule, f"give {layers} numbers, 0 full attention and 1 window")
    if attention.window_size_tokens is None:
        rule = "has no effect while model.attention.window_size_tokens is not set"
        yield Problem(path, pattern, rule, f"set model.attention.window_size_tokens, or {path}=null")
    if config.model.mtp.num_layers:
        rule = "names the layers only: megatron-core would look for model.mtp.num_layers more"
        yield Problem(path, pattern, rule, f"set {path}=null, or model.mtp.num_layers=0")


@reads("model.attention", "model.norm")
def norm_of_all_heads(config: Config) -> Iterator[Problem]:
    """model.attention.qk_norm_span = all_heads needs norms of queries and keys, which are RMSNorms."""
    attention, path = config.model.attention, "model.attention.qk_norm_span"
    if attention.qk_norm_span == "head":
        return
    if not attention.qk_norm:
        rule = "has no effect while model.attention.qk_norm is off"
        yield Problem(path, attention.qk_norm_span, rule, f"set model.attention.qk_norm=true, or {path}=head")
    if config.model.norm != "rmsnorm":
        rule = f"all_heads needs model.norm = rmsnorm, not {config.model.norm}"
        yield Problem(path, attention.qk_norm_span, rule, f"set model.norm=rmsnorm, or {path}=head")


@reads("model.attention", "model.norm", "model.mla")
def norm_after_rotation(config: Config) -> Iterator[Problem]:
    """model.attention.qk_norm_after_rotation needs norms of queries and keys, RMSNorms of each head."""
    attention, path = config.model.attention, "model.attention.qk_norm_after_rotation"
    if not attention.qk_norm_after_rotation:
        return
    fix = f"set {path}=false"
    if not attention.qk_norm:
        yield Problem(
            path, True, "has no effect while model.attention.qk_norm is off", f"set model.attention.qk_norm=true, or {path}=false"
        )
    if attention.qk_norm_span != "head":
        yield Problem(path, True, "needs model.attention.qk_norm_span = head", fix)
    if config.model.norm != "rmsnorm":
        yield Problem(path, True, f"needs model.norm = rmsnorm, not {config.model.norm}", fix)


@reads("model.position", "model.num_layers", "model.mtp", "model.mla")
def rotated_layers_fit(config: Config) -> Iterator[Problem]:
    """model.position.layer_pattern names every layer, needs rotary positions, and excludes latent attention and MTP."""
    model, path = config.model, "model.position.layer_pattern"
    pattern, layers = model.position.layer_pattern, model.num_layers
    if pattern is None:
        return
    if len(pattern) != layers:
        rule = f"must name each of the model.num_layers = {layers} layers, not {len(pattern)}"
        yield Problem(path, pattern, rule, f"give {layers} numbers, 0 no positions and 1 rotated")
    if model.position.kind != "rope":
        rule = f"has no effect while model.position.kind = {model.position.kind}"
        yield Problem(path, pattern, rule, f"set {path}=null, or model.position.kind=rope")
    if arch.is_mla(model):
        rule = "excludes latent attention (model.mla.kv_lora_rank): megatron-core rotates all of its layers"
        yield Problem(path, pattern, rule, f"set {path}=null")
    if model.mtp.num_layers:
        rule = "names the layers only: megatron-core would look for model.mtp.num_layers more"
        yield Problem(path, pattern, rule, f"set {path}=null, or model.mtp.num_layers=0")


@reads("model.attention", "model.position", "model.delta_net")
def llama4_attention(config: Config) -> Iterator[Problem]:
    """model.attention.qk_l2_norm needs rotated layers, .temperature_growth layers without positions; both exclude qk_norm."""
    attention, pattern = config.model.attention, config.model.position.layer_pattern
    for name, value in (("qk_l2_norm", attention.qk_l2_norm), ("temperature_growth", attention.temperature_growth)):
        path, fix = f"model.attention.{name}", f"leave model.attention.{name} out"
        if value and attention.qk_norm:
            yield Problem(path, value, "excludes model.attention.qk_norm: one kind of attention has one of them", fix)
        if value and arch.has_delta_net(config.model):
            yield Problem(path, value, "excludes gated delta nets (model.delta_net.pattern)", fix)
    if attention.qk_l2_norm and config.model.position.kind != "rope":
        rule = f"is the norm of rotated layers: model.position.kind = {config.model.position.kind}"
        yield Problem("model.attention.qk_l2_norm", True, rule, "leave it out, or set model.position.kind=rope")
    if attention.temperature_growth and (pattern is None or all(pattern)):
        rule = "has no effect: every layer has positions"
        fix = "set model.position.layer_pattern, or model.attention.temperature_growth=0"
        yield Problem("model.attention.temperature_growth", attention.temperature_growth, rule, fix)


@reads("model.attention", "batch.seq_length_tokens", "cluster")
def chunks_fit(config: Config) -> Iterator[Problem]:
    """Chunked windows need a size, and on GPUs a sequence of one chunk: Transformer Engine has no such mask."""
    attention, length, path = config.model.attention, config.batch.seq_length_tokens, "model.attention.window_kind"
    if attention.window_kind == "sliding":
        return
    if attention.window_size_tokens is None:
        rule = "has no effect while model.attention.window_size_tokens is not set"
        yield Problem(path, attention.window_kind, rule, f"set model.attention.window_size_tokens, or {path}=sliding")
    elif on_gpu(config) and length > attention.window_size_tokens:
        rule = f"needs sequences of at most {attention.window_size_tokens} tokens on GPUs, not {length}: kernels have no chunks"
        fix = f"set batch.seq_length_tokens={attention.window_size_tokens}"
        yield Problem(path, attention.window_kind, rule, fix)


RULES = (
    llama4_attention,
    chunks_fit,
    window_pattern_fits,
    norm_of_all_heads,
    norm_after_rotation,
    rotated_layers_fit,
)
