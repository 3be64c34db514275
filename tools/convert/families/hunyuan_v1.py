"""Hunyuan 1 (Tencent, arXiv 2411.02265; Hunyuan-A13B): q/k norms after the rotation; dense, and MoE with a shared expert.

Source: transformers models/hunyuan_v1_dense and hunyuan_v1_moe.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config import settings
from tools.convert.hf_config.biases import BIASES, Biases
from tools.convert.hf_config.family import ConfigKey, Family
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

_A = "model.layers.{L}.self_attn."
_M = "model.layers.{L}.mlp."


_ROPE = Rope()


@dataclass(frozen=True)
class AlphaRope:
    """Rotary positions, whose scaling "dynamic" with an alpha is another base: theta x alpha^(d / (d - 2)), d the head's width.

    It is read into that base, and written as such.
    """

    def names(self) -> tuple[str, ...]:
        return _ROPE.names()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        # transformers reads the older key alone where both are there.
        scaling = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
        is_mapping = isinstance(scaling, Mapping)
        kind, alpha = (scaling.get("rope_type") or scaling.get("type"), scaling.get("alpha")) if is_mapping else (None, None)
        if kind != "dynamic" or not alpha:
            yield from _ROPE.read(hf_config, model)
            return
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0:
            yield Problem("config.json: rope alpha", alpha, "must be a number above 0", "mend the config.json")
            return
        plain = {"rope_theta": scaling.get("rope_theta") or hf_config.get("rope_theta") or _ROPE.theta}
        yield from _ROPE.read(plain, model)
        width = arch.head_dim(model)
        model.position.theta *= float(alpha) ** (width / (width - 2))

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        yield from _ROPE.write(model, hf_config)


@dataclass(frozen=True)
class EqualInAllLayers:
    """A number, or a list with one number for each layer, which must be equal. It is written as a number."""

    number: ConfigKey

    def names(self) -> tuple[str, ...]:
        return self.number.names()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        stated = {name: hf_config[name] for name in self.names() if hf_config.get(name) is not None}
        for name, value in stated.items():
            if isinstance(value, list):
                if len(set(map(str, value))) != 1:
                    yield Problem(f"config.json: {name}", value, "must be equal in all layers", "convert another model")
                    return
                stated[name] = value[0]
        yield from self.number.read(stated, model)

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        return self.number.write(model, hf_config)


@dataclass(frozen=True)
class OneSharedExpert:
    """One shared expert as wide as a routed one. No key of config.json that transformers reads."""

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        model.moe.shared_ffn_hidden_size = arch.expert_ffn(model)
        return iter(())

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        if model.moe.shared_ffn_hidden_size != arch.expert_ffn(model):
            yield f"its shared expert has the width of a routed one, {arch.expert_ffn(model)}"


_SHARED_SETTINGS = (
    settings.PLAIN_MLP,
    settings.HeadDim(),
    AlphaRope(),
    Biases(),
    *settings.plain_attention(*BIASES, **{"attention.qk_norm": True, "attention.qk_norm_after_rotation": True}),
)
_ATTENTION = tensors.attention(_A + "query_layernorm.weight", _A + "key_layernorm.weight")

HUNYUAN_V1_DENSE = Family(
    name="hunyuan_v1_dense",
    model_types=("hunyuan_v1_dense",),
    architecture="HunYuanDenseV1ForCausalLM",
    settings=(*settings.decoder(1e-5, settings.KeyValueHeads(None)), *_SHARED_SETTINGS, settings.NoExperts()),
    tensors=(*tensors.EMBEDDING, *_ATTENTION, *tensors.DENSE_MLP),
    ignored=("eod_token_id", "sep_token_id", "pretraining_tp"),
)

HUNYUAN_V1_MOE = Family(
    name="hunyuan_v1_moe",
    model_types=("hunyuan_v1_moe",),
    architecture="HunYuanMoEV1ForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(None), ffn="moe.ffn_hidden_size"),
        *_SHARED_SETTINGS,
        EqualInAllLayers(ConfigKey("num_experts", "moe.num_experts", 1, aliases=("num_local_experts",))),
        EqualInAllLayers(ConfigKey("moe_topk", "moe.top_k", 1, aliases=("num_experts_per_tok",))),
        OneSharedExpert(),
        settings.AllSparse(),
        *settings.softmax_router(**{"moe.router.normalize_top_k": True, "moe.shared_gate": False}),
    ),
    tensors=(
        *tensors.EMBEDDING, *_ATTENTION, *tensors.experts(_M + "gate.wg.weight"), *tensors.shared_experts("shared_mlp"),
    ),
    # transformers reads neither: all experts have intermediate_size, and one is shared.
    ignored=("eod_token_id", "sep_token_id", "pretraining_tp", "moe_intermediate_size", "num_shared_expert"),
)  # fmt: skip
