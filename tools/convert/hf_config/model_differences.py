"""Comparison of two `model` sections with their defaults filled in. Two ways to express the same model compare equal.

Torch-free.
"""

from __future__ import annotations

import copy
from typing import Any

from configs.model_schema import DeltaNet, Model
from parallel import architecture as arch
from pretrain.checkpoint.allowed_changes import architecture


def resolved_model(model: Model) -> dict[str, Any]:
    """Key -> effective value of every key that weights or outputs depend on. Keys without an effect are left out."""
    model = copy.deepcopy(model)
    has_experts = model.moe.num_experts > 0
    model.attention.num_query_groups = arch.num_query_groups(model)
    model.moe.layer_pattern = [int(flag) for flag in arch.moe_layers(model)]
    model.moe.first_dense_layers, model.moe.layer_frequency = 0, 1
    model.moe.ffn_hidden_size = arch.expert_ffn(model) if has_experts else None
    model.ffn_hidden_size = None if has_experts and all(arch.moe_layers(model)) else arch.ffn(model)
    if arch.is_mla(model):
        model.mla.norm_eps = model.mla.norm_eps or model.norm_eps
        model.attention.head_dim = None
    else:
        model.attention.head_dim = arch.head_dim(model)
    if model.position.layer_pattern is not None and all(model.position.layer_pattern):
        model.position.layer_pattern = None
    if not model.attention.qk_norm:
        model.attention.qk_norm_span, model.attention.qk_norm_after_rotation = "head", False
    if arch.has_delta_net(model):
        model.delta_net.pattern = [int(flag) for flag in arch.delta_layers(model)]
    else:
        model.delta_net = DeltaNet()
    if model.position.kind != "learned":
        model.max_position_tokens = None
    if model.attention.window_size_tokens is not None:
        windows = [int(arch.window_of_layer(model, layer) is not None) for layer in range(model.num_layers)]
        model.attention.window_pattern, model.attention.window_layers = windows, "all"
        model.attention.window_size_tokens = model.attention.window_size_tokens if any(windows) else None
    values = architecture(model, model.vocab_size or 0)
    unused = {"vocab_multiple", "mla.qk_nope_head_dim", "mla.qk_rope_head_dim", "mla.v_head_dim", "mla.norm_eps"}
    unused -= set() if not arch.is_mla(model) else unused - {"vocab_multiple"}
    if not has_experts:
        unused |= {key for key in values if key.startswith("moe.") and key != "moe.num_experts"}
    if model.attention.window_size_tokens is None:
        values["position.scaling.layers"] = "all"
        unused |= {"attention.window_layers", "attention.window_pattern", "attention.window_kind"}
    if model.moe.router.num_groups == model.moe.router.group_top_k:
        # A token may use every group.
        values["moe.router.num_groups"] = None
    if values.get("moe.router.num_groups") is None:
        unused |= {"moe.router.group_top_k", "moe.router.group_score_experts"}
    else:
        values["moe.router.group_score_experts"] = arch.group_score_experts(model)
    if not model.attention.temperature_growth:
        unused.add("attention.temperature_step_tokens")
    unused |= _unused_of_scaling(model)
    return {key: value for key, value in values.items() if key not in unused}


def _unused_of_scaling(model: Model) -> set[str]:
    prefix, kind = "position.scaling.", model.position.scaling.kind
    yarn = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    llama3 = {"low_freq_factor", "high_freq_factor"}
    names = {
        "none": yarn | llama3 | {"factor", "original_max_position", "layers"},
        "linear": yarn | llama3 | {"original_max_position"},
        "llama3": yarn,
        "yarn": llama3,
    }[kind]
    return {prefix + name for name in names}


def model_differences(first: Model, second: Model) -> list[str]:
    """One sentence for each effective key in which the two models differ."""
    one, two = resolved_model(first), resolved_model(second)
    return [
        f"model.{key}: {one.get(key)!r} and {two.get(key)!r}"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
    ]
