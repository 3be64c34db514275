"""Megatron-LM's saved arguments -> `model` section.

In: the value of `args` in common.pt (names of megatron/training/arguments.py). Out: Model, problems, notes. Every argument
that changes the meaning of the weights is either read, or must have the one value that this model can express.

Torch-free.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from tools.convert.hf_config.family import UnsupportedModel, put

_MISSING = object()
_FIX = "state the model yourself: --model PRESET|YAML"


@dataclass(frozen=True)
class Arg:
    """The same value as a Megatron-LM argument and as a key of the `model` section.

    `absent`: Megatron-LM's own default (None keeps ours). `when`: whether the argument has an effect.
    """

    argument: str
    model_key: str
    absent: Any = None
    kind: type = int
    when: Callable[[Mapping[str, Any]], bool] = lambda args: True


def _moe(args: Mapping[str, Any]) -> bool:
    return bool(args.get("num_experts"))


def _mla(args: Mapping[str, Any]) -> bool:
    return bool(args.get("multi_latent_attention"))


def _not_mla(args: Mapping[str, Any]) -> bool:
    return not _mla(args)


def _grouped(args: Mapping[str, Any]) -> bool:
    return bool(args.get("group_query_attention")) and not _mla(args)


ARGS = (
    Arg("num_layers", "num_layers", _MISSING), Arg("hidden_size", "hidden_size", _MISSING),
    Arg("num_attention_heads", "attention.num_heads", _MISSING), Arg("ffn_hidden_size", "ffn_hidden_size"),
    Arg("norm_epsilon", "norm_eps", 1e-5, float), Arg("max_position_embeddings", "max_position_tokens"),
    Arg("hidden_dropout", "hidden_dropout", 0.1, float), Arg("attention_dropout", "attention.dropout", 0.1, float),
    Arg("init_method_std", "init_std", 0.02, float),
    Arg("num_query_groups", "attention.num_query_groups", 1, when=_grouped),
    Arg("kv_channels", "attention.head_dim", when=_not_mla),
    Arg("qk_layernorm", "attention.qk_norm", False, bool, _not_mla),
    Arg("rotary_base", "position.theta", 10000.0, float), Arg("rotary_percent", "position.rotary_fraction", 1.0, float),
    Arg("rotary_interleaved", "position.interleaved", False, bool),
    Arg("kv_lora_rank", "mla.kv_lora_rank", 32, when=_mla), Arg("q_lora_rank", "mla.q_lora_rank", when=_mla),
    Arg("qk_head_dim", "mla.qk_nope_head_dim", 128, when=_mla),
    Arg("qk_pos_emb_head_dim", "mla.qk_rope_head_dim", 64, when=_mla), Arg("v_head_dim", "mla.v_head_dim", 128, when=_mla),
    Arg("num_experts", "moe.num_experts", when=_moe), Arg("moe_router_topk", "moe.top_k", 2, when=_moe),
    Arg("moe_ffn_hidden_size", "moe.ffn_hidden_size", when=_moe),
    Arg("moe_shared_expert_intermediate_size", "moe.shared_ffn_hidden_size", when=_moe),
    Arg("moe_shared_expert_gate", "moe.shared_gate", False, bool, _moe),
    Arg("moe_router_score_function", "moe.router.score", "softmax", str, _moe),
    Arg("moe_router_topk_scaling_factor", "moe.router.scaling_factor", 1.0, float, _moe),
    Arg("moe_router_num_groups", "moe.router.num_groups", when=_moe),
    Arg("moe_router_group_topk", "moe.router.group_top_k", when=_moe),
    Arg("moe_router_enable_expert_bias", "moe.router.expert_bias", False, bool, _moe),
    Arg("moe_router_bias_update_rate", "moe.router.expert_bias_update_rate", 1e-3, float, _moe),
    Arg("moe_z_loss_coeff", "moe.router.z_loss_coeff", 0.0, float, _moe),
    Arg("moe_input_jitter_eps", "moe.router.jitter_eps", 0.0, float, _moe),
    Arg("moe_expert_capacity_factor", "moe.capacity_factor", None, float, _moe),
    Arg("moe_pad_expert_input_to_capacity", "moe.pad_to_capacity", False, bool, _moe),
    Arg("moe_token_drop_policy", "moe.drop_policy", "probs", str, _moe),
    Arg("mtp_num_layers", "mtp.num_layers", 0), Arg("mtp_loss_scaling_factor", "mtp.loss_coeff", 0.1, float),
)  # fmt: skip

# Arguments with only one value that the model can express, and what every other value would mean.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "apply_layernorm_1p": ((False, None), "its norms multiply by 1 + weight"),
    "apply_residual_connection_post_layernorm": ((False, None), "its residual connections start after the norm"),
    "qk_l2_norm": ((False, None), "its queries and keys are normalised without weights"),
    "attention_output_gate": ((False, None), "its attention has a gate"),
    "moe_apply_probs_on_input": ((False, None), "its experts' inputs are weighted, not their outputs"),
    "moe_router_topk_limited_devices": ((None,), "its experts depend on the layout that it was trained with"),
    "moe_latent_size": ((None,), "its experts work on a projection"),
    "moe_use_legacy_grouped_gemm": ((False, None), "its experts are stored transposed in one tensor"),
    "linear_attention_type": ((None,), "it has linear attention"),
    "linear_attention_freq": ((None,), "it has linear attention"),
    "experimental_attention_variant": ((None,), "it has another kind of attention"),
    "no_rope_freq": ((None,), "some of its layers have no positions"),
    "heterogeneous_layers_config_path": ((None,), "its layers differ in kind"),
    "hybrid_override_pattern": ((None,), "it is a hybrid with Mamba layers"),
    "is_hybrid_model": ((False, None), "it is a hybrid with Mamba layers"),
    "encoder_num_layers": ((None,), "it has an encoder"),
    "openai_gelu": ((False, None), "its activation is another GELU"),
}  # fmt: skip


def read_args(args: Mapping[str, Any]) -> tuple[Model, list[Problem], list[str]]:
    """(model, problems, notes) of the saved arguments."""
    model, problems, notes = Model(), [], list[str]()
    for arg in ARGS:
        if arg.when(args):
            problems += _read(arg, args, model)
    for name, (values, why) in ONLY.items():
        if name in args and args[name] not in values and not (name == "encoder_num_layers" and args[name] == args["num_layers"]):
            problems.append(
                UnsupportedModel(
                    f"args.{name}", _shown(args[name]), f"must be {values[0]!r}: {why}", "this checkpoint can't be imported"
                )
            )
    for read in (_vocabulary, _activation, _norms_and_biases, _positions, _windows, _routing):
        problems += read(args, model, notes)
    return model, problems, notes


def _shown(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, tuple)) else repr(value)


def _read(arg: Arg, args: Mapping[str, Any], model: Model) -> Iterator[Problem]:
    value = args.get(arg.argument)
    value = arg.absent if value is None else value
    if value is _MISSING:
        yield Problem(f"args.{arg.argument}", None, f"must be present: it sets model.{arg.model_key}", _FIX)
    elif value is not None:
        right = isinstance(value, (int, float) if arg.kind is float else arg.kind) and isinstance(value, bool) == (
            arg.kind is bool
        )
        if right:
            put(model, arg.model_key, arg.kind(value))
        else:
            yield Problem(
                f"args.{arg.argument}", _shown(value), f"must be of type {arg.kind.__name__}: it sets model.{arg.model_key}", _FIX
            )


def _vocabulary(args: Mapping[str, Any], model: Model, notes: list[str]) -> Iterator[Problem]:
    real, padded = args.get("vocab_size"), args.get("padded_vocab_size")
    model.tie_embeddings = not args.get("untie_embeddings_and_output_weights", False)
    model.vocab_size = real or padded
    if not isinstance(model.vocab_size, int):
        yield Problem("args.padded_vocab_size", padded, "must be present, or vocab_size: it sets model.vocab_size", _FIX)
    elif real is None:
        notes.append(f"the number of real tokens is not recorded: all {padded} rows of the padded table are kept")


def _activation(args: Mapping[str, Any], model: Model, notes: list[str]) -> Iterator[Problem]:
    if args.get("swiglu"):
        model.activation = "swiglu"
    elif args.get("quick_geglu"):
        model.activation = "gpt_oss_glu"
        settings = (args.get("glu_linear_offset", 0.0), args.get("activation_func_clamp_value"))
        if settings != (1.0, 7.0):
            rule = "glu_linear_offset and activation_func_clamp_value must be 1.0 and 7.0 with quick_geglu: those of gpt-oss"
            yield UnsupportedModel("args.quick_geglu", settings, rule, "this checkpoint can't be imported")
    elif args.get("squared_relu"):
        model.activation = "relu2"
    else:
        model.activation = "gelu"
        if args.get("bias_gelu_fusion", True):
            notes.append(
                "args.bias_gelu_fusion: Megatron-LM's fused GELU is an approximation, ours is exact: outputs differ slightly"
            )


def _norms_and_biases(args: Mapping[str, Any], model: Model, notes: list[str]) -> Iterator[Problem]:
    norm = args.get("normalization", "LayerNorm")
    model.norm = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}.get(norm, str(norm))
    if model.norm not in ("rmsnorm", "layernorm"):
        yield UnsupportedModel("args.normalization", norm, "must be RMSNorm or LayerNorm", "this checkpoint can't be imported")
    biases = bool(args.get("add_bias_linear", True))
    model.mlp_bias = model.attention.output_bias = biases
    model.attention.qkv_bias = biases or bool(args.get("add_qkv_bias", False))
    if _mla(args) and not args.get("qk_layernorm"):
        rule = "must be on with latent attention: Phalanx always normalizes compressed queries and keys"
        yield UnsupportedModel("args.qk_layernorm", False, rule, "this checkpoint can't be imported")


def _positions(args: Mapping[str, Any], model: Model, notes: list[str]) -> Iterator[Problem]:
    position, kind = model.position, args.get("position_embedding_type", "learned_absolute")
    kinds = {"rope": "rope", "yarn": "rope", "learned_absolute": "learned", "none": "none"}
    if kind not in kinds:
        yield UnsupportedModel(
            "args.position_embedding_type", kind, f"must be one of {', '.join(kinds)}", "this checkpoint can't be imported"
        )
        return
    position.kind = "rope" if _mla(args) else kinds[kind]
    scaling = position.scaling
    if _mla(args):
        yield from _latent_scaling(args, model)
    elif kind == "yarn":
        scaling.kind = "yarn"
        numbers = {"rotary_scaling_factor": "factor", "original_max_position_embeddings": "original_max_position",
                   "beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim",
                   "correction_range_round_to_int": "truncate"}  # fmt: skip
        for argument, model_key in numbers.items():
            value = args.get(f"yarn_{argument}")
            if value is None:
                yield Problem(f"args.yarn_{argument}", None, f"must be present: it sets model.position.scaling.{model_key}", _FIX)
            else:
                setattr(scaling, model_key, value)
    elif args.get("use_rope_scaling"):
        # megatron-core fixes the other values: 8192 tokens, factors 1 and 4.
        scaling.kind, scaling.factor, scaling.original_max_position = "llama3", float(args.get("rope_scaling_factor", 8.0)), 8192
        scaling.low_freq_factor, scaling.high_freq_factor = 1.0, 4.0
    elif args.get("rotary_seq_len_interpolation_factor") not in (None, 1):
        scaling.kind, scaling.factor = "linear", float(args["rotary_seq_len_interpolation_factor"])


def _latent_scaling(args: Mapping[str, Any], model: Model) -> Iterator[Problem]:
    scaling, factor = model.position.scaling, float(args.get("rotary_scaling_factor") or 1.0)
    # Megatron-LM's own default with latent attention is yarn.
    kind = args.get("rope_type") or "yarn"
    if kind == "yarn":
        scaling.kind, scaling.factor = "yarn", factor
        scaling.original_max_position = int(args.get("original_max_position_embeddings") or 4096)
        scaling.beta_fast, scaling.beta_slow = float(args.get("beta_fast", 32.0)), float(args.get("beta_slow", 1.0))
        scaling.mscale, scaling.mscale_all_dim = float(args.get("mscale", 1.0)), float(args.get("mscale_all_dim", 0.0))
    elif factor != 1.0:
        rule = "must be 1 with rope_type rope: megatron-core would still scale the softmax by it"
        yield UnsupportedModel("args.rotary_scaling_factor", factor, rule, "this checkpoint can't be imported")


def _windows(args: Mapping[str, Any], model: Model, notes: list[str]) -> Iterator[Problem]:
    attention, window, skip = model.attention, args.get("window_size"), args.get("window_attn_skip_freq")
    if window is not None:
        left, right = (*window, None, None)[:2] if isinstance(window, (tuple, list)) else (None, None)
        if not isinstance(left, int) or right not in (0, -1):
            yield UnsupportedModel(
                "args.window_size", _shown(window), "must be (N, 0): causal", "this checkpoint can't be imported"
            )
            return
        attention.window_size_tokens = left + 1
        attention.window_layers = "alternate" if skip == 2 else "all"
        if skip not in (None, 2):
            yield UnsupportedModel(
                "args.window_attn_skip_freq", _shown(skip), "must be 2 or unset", "this checkpoint can't be imported"
            )
    kind = args.get("softmax_type", "vanilla")
    attention.sinks = kind == "learnable"
    if kind not in ("vanilla", "learnable"):
        yield UnsupportedModel("args.softmax_type", kind, "must be vanilla or learnable", "this checkpoint can't be imported")


def _routing(args: Mapping[str, Any], model: Model, notes: list[str]) -> Iterator[Problem]:
    if not _moe(args):
        return
    router, moe = model.moe.router, model.moe
    router.normalize_top_k = router.score == "sigmoid" or not args.get("moe_router_pre_softmax", False)
    balance, coefficient = args.get("moe_router_load_balancing_type", "aux_loss"), args.get("moe_aux_loss_coeff", 0.0)
    if isinstance(balance, (list, tuple)) and len(balance) == 1:
        balance, coefficient = balance[0], coefficient[0] if isinstance(coefficient, (list, tuple)) else coefficient
    if balance in ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"):
        router.balance, router.aux_loss_coeff = balance, float(coefficient or 0.0)
    else:
        rule = "must be one of aux_loss, seq_aux_loss, global_aux_loss, none"
        yield UnsupportedModel("args.moe_router_load_balancing_type", _shown(balance), rule, _FIX)
    pattern = _pattern(args.get("moe_layer_freq", 1), model.num_layers)
    if pattern is None or len(pattern) != model.num_layers:
        rule = f"must be a number, or {model.num_layers} zeros and ones"
        yield Problem("args.moe_layer_freq", _shown(args.get("moe_layer_freq")), rule, _FIX)
    else:
        moe.layer_pattern = None if all(pattern) else pattern


def _pattern(value: Any, num_layers: int) -> list[int] | None:
    """1 for each MoE layer, 0 for each dense one. Megatron-LM also saves the expression as it was typed: "[0]*1+[1]*26"."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int) and value > 0:
        return [int(layer % value == 0) for layer in range(num_layers)]
    if isinstance(value, str):
        try:
            value = _evaluate(ast.parse(value, mode="eval").body)
        except (SyntaxError, ValueError):
            return None
    return [int(flag) for flag in value] if isinstance(value, (list, tuple)) and set(value) <= {0, 1} else None


def _evaluate(node: ast.expr) -> Any:
    """The value of an expression of lists of integers, their sums and multiples. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) < 10000:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and {type(left), type(right)} == {list, int}:
            return left * right
    raise ValueError(f"{ast.dump(node)} is no list of numbers")
