"""The architecture of a published row as our `Model`.

In: the row's `model` mapping (format: README.md of tools/planner/data). Out: Model and vocabulary, or why it can't be made.
Stated defaults: as many key/value heads as heads; ffn 4h; vocabulary 51,200; two matrices for gelu and squared relu, else
swiglu; tied embeddings only where the row says so, except in Megatron's own test models.

Torch-free.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from configs.model_schema import Attention, LatentAttention, Model, MoE, MultiToken, Position
from tools.planner.published.parse_words import preset_of

DEFAULT_VOCAB = 51200
# Moonlight and DeepSeek-V2-Lite: latent attention without compressed queries (their published configs).
DEFAULT_KV_LORA, DEFAULT_NOPE, DEFAULT_ROPE, DEFAULT_V = 512, 128, 64, 128


class UnusableRow(Exception):
    """A row that can't be compared; the text is the reason it is counted under."""


def _activation(text: str | None) -> str:
    words = (text or "swiglu").lower()
    if "glu" in words:
        return "swiglu"
    return "relu2" if "relu" in words else "gelu"


def _number(model: dict[str, Any], name: str, *argument_names: str) -> int | None:
    """A value of the row, or of the Megatron arguments it carries."""
    args = model.get("args") or {}
    for value in (model.get(name), *(args.get(argument) for argument in argument_names)):
        if value is not None:
            return int(value)
    return None


def _pattern(text: str, num_layers: int) -> list[int] | None:
    """Megatron's moe_layer_freq, "([0]*3+[1]*12)", as a list; None when it doesn't say every layer."""
    parts = re.findall(r"\[(\d)\]\*(\d+)", text)
    flags = [int(flag) for flag, count in parts for _ in range(int(count))]
    return flags if len(flags) == num_layers else None


def _windows(model: dict[str, Any], num_layers: int) -> tuple[int | None, list[int] | None]:
    """(window in tokens, which layers have it; None: all): of a row's `sliding_window` and `sliding_every`, or of `window` and
    words as "0-3,5-8 sliding, 4 and 9 full" or "even layers sliding"."""
    words, window = str(model.get("window_layers") or ""), _number(model, "sliding_window") or _number(model, "window")
    if window is None:
        return None, None
    if model.get("sliding_every") == 2 or words.startswith("even layers sliding"):
        return window, [1 - layer % 2 for layer in range(num_layers)]
    ranges = re.findall(r"(\d+)(?:-(\d+))?", words.split(" sliding")[0]) if " sliding" in words else []
    layers = {layer for first, last in ranges for layer in range(int(first), int(last or first) + 1)}
    return window, [int(layer in layers) for layer in range(num_layers)] if layers else None


def _moe(model: dict[str, Any], num_layers: int) -> MoE:
    experts = int(model.get("num_experts") or 0)
    if not experts:
        return MoE()
    pattern = _pattern(str(model.get("moe_layer_freq") or ""), num_layers)
    moe_layers = int(model.get("moe_layers") or num_layers)
    first_dense = model.get("first_dense_layers")
    frequency = 1
    if first_dense is None and pattern is None and moe_layers < num_layers:
        if num_layers % moe_layers == 0:
            frequency = num_layers // moe_layers
        else:
            first_dense = num_layers - moe_layers
    return MoE(
        num_experts=experts,
        top_k=int(model.get("topk") or 1),
        ffn_hidden_size=_number(model, "moe_ffn_hidden_size") or _number(model, "ffn_hidden_size"),
        first_dense_layers=int(first_dense or 0),
        layer_frequency=frequency,
        layer_pattern=pattern,
        shared_ffn_hidden_size=int(model.get("shared_expert_ffn") or 0) or None,
    )


def _mla(model: dict[str, Any]) -> LatentAttention:
    if model.get("attention") != "MLA" and model.get("kv_lora_rank") is None:
        return LatentAttention()
    return LatentAttention(
        kv_lora_rank=_number(model, "kv_lora_rank", "kv-lora-rank") or DEFAULT_KV_LORA,
        q_lora_rank=_number(model, "q_lora_rank", "q-lora-rank"),
        qk_nope_head_dim=_number(model, "qk_nope_head_dim", "qk-head-dim") or DEFAULT_NOPE,
        qk_rope_head_dim=_number(model, "qk_rope_head_dim", "qk-pos-emb-head-dim") or DEFAULT_ROPE,
        v_head_dim=_number(model, "v_head_dim", "v-head-dim") or DEFAULT_V,
    )


def _is_hybrid(model: dict[str, Any]) -> bool:
    name = str(model.get("name", "")).lower()
    return "hybrid" in name or "mamba" in name or "hybrid-layer-pattern" in (model.get("args") or {})


def _of_preset(model: dict[str, Any]) -> tuple[Model, int] | None:
    """The shipped preset of the row's name, unless what the row does say is something else."""
    found = preset_of(str(model.get("name") or ""))
    if found is None:
        return None
    known = found[0]
    sizes = {"num_layers": known.num_layers, "hidden_size": known.hidden_size, "num_heads": known.attention.num_heads,
             "num_experts": known.moe.num_experts}  # fmt: skip
    return found if all(_number(model, name) in (None, size) for name, size in sizes.items()) else None


def model_of(model: dict[str, Any], is_test: bool) -> tuple[Model, int, bool]:
    """(model, vocabulary, whether they are a preset's). `is_test`: Megatron's CI models, whose tables are tied and whose dropout
    is on unless said."""
    if _is_hybrid(model):
        raise UnusableRow("hybrid or Mamba layers")
    layers, hidden, heads = (_number(model, name) for name in ("num_layers", "hidden_size", "num_heads"))
    if layers is None or hidden is None or heads is None:
        preset = _of_preset(model)
        if preset is None:
            raise UnusableRow("architecture incomplete")
        return *preset, True
    args = model.get("args") or {}
    mla = _mla(model)
    head_dim = _number(model, "head_dim")
    if head_dim is None and hidden % heads:
        raise UnusableRow("architecture incomplete")
    known, moe = _of_preset(model), _moe(model, layers)
    if known:
        # Groups that routing is limited to, and biases: rows don't tell.
        moe = replace(moe, router=known[0].moe.router)
    tied = model.get("tied_embeddings")
    tied = is_test and "untie-embeddings-and-output-weights" not in args if tied is None else tied
    window, pattern = _windows(model, layers)
    dropout = 0.1 if is_test and "attention-dropout" not in args else 0.0
    return (
        Model(
            name=str(model.get("name", "?")),
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=_number(model, "ffn_hidden_size"),
            activation=_activation(model.get("mlp")),
            tie_embeddings=bool(tied),
            hidden_dropout=dropout,
            max_position_tokens=2048 if model.get("positions") == "learned" else None,
            attention=Attention(
                num_heads=heads,
                num_query_groups=None if mla.kv_lora_rank else _number(model, "num_kv_heads"),
                head_dim=None if mla.kv_lora_rank else head_dim,
                window_size_tokens=window,
                window_pattern=pattern,
                dropout=dropout,
            ),
            mla=mla,
            position=Position(kind="learned" if model.get("positions") == "learned" else "rope"),
            moe=moe,
            mlp_bias=bool(known and known[0].mlp_bias),
            mtp=MultiToken(num_layers=int(model.get("mtp_layers") or 0)),
        ),
        _number(model, "vocab_size") or DEFAULT_VOCAB,
        False,
    )
