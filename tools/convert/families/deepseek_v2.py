"""DeepSeek-V2 (arXiv 2405.04434): latent attention, shared experts, softmax scores.

Source: transformers models/deepseek_v2. V2 (236B) chooses groups of experts by their best expert; V2-Lite has no groups.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import DeepSeekBalance
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, UnsupportedModel
from tools.convert.hf_config.latent_attention import latent_attention
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors

_METHOD, _PLAIN, _GROUPED = "topk_method", "greedy", "group_limited_greedy"
_GROUPS = settings.ExpertGroups(absent=(1, 1), scored=1)


@dataclass(frozen=True)
class GroupsByMethod:
    """topk_method, n_group and topk_group. With greedy, transformers reads no groups."""

    def names(self) -> tuple[str, ...]:
        return (_METHOD, *_GROUPS.names())

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        method = hf_config.get(_METHOD, _PLAIN)
        if method not in (_PLAIN, _GROUPED):
            rule = f"must be {_PLAIN} or {_GROUPED}: transformers knows no other"
            yield UnsupportedModel(f"config.json: {_METHOD}", method, rule, "convert another model")
        elif method == _GROUPED:
            yield from _GROUPS.read(hf_config, model)
        elif any(hf_config.get(name) not in (1, None, 0) for name in _GROUPS.names()):
            rule = f"must be {_GROUPED} where there are groups: readers differ in whether {_PLAIN} uses them"
            yield Problem(f"config.json: {_METHOD}", method, rule, "state it, or n_group and topk_group of 1")

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        yield from _GROUPS.write(model, hf_config)
        hf_config[_METHOD] = _GROUPED if hf_config["n_group"] != hf_config["topk_group"] else _PLAIN
        if hf_config[_METHOD] == _PLAIN:
            hf_config |= {"n_group": 1, "topk_group": 1}


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    architecture="DeepseekV2ForCausalLM",
    settings=(
        *settings.decoder(1e-6),
        settings.PLAIN_MLP,
        *latent_attention(),
        Rope(),
        ConfigKey("n_routed_experts", "moe.num_experts", 64, aliases=("num_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k"),
        ConfigKey("moe_intermediate_size", "moe.ffn_hidden_size", 1407),
        ConfigKey("routed_scaling_factor", "moe.router.scaling_factor", 1.0, float),
        DeepSeekBalance(),
        settings.SharedExperts(absent=2),
        settings.DenseFirst(absent=0),
        GroupsByMethod(),
        AllowedValues("norm_topk_prob", (False, None), "transformers does not normalise the weights of DeepSeek-V2"),
        AllowedValues("moe_layer_freq", (1, None), "its MoE layers follow each other"),
        AllowedValues("scoring_func", ("softmax", None), "the family's scores are softmax"),
        AllowedValues("mlp_bias", (False, None), "megatron-core has one switch for the biases of all linear layers"),
        *settings.softmax_router(**{"moe.router.normalize_top_k": False, "moe.router.scaling_factor": settings.REQUIRED,
                                 "moe.router.num_groups": settings.REQUIRED,
                                 "moe.shared_gate": False, "mtp.num_layers": 0}),
    ),
    tensors=(*tensors.EMBEDDING, *tensors.LATENT, *tensors.DENSE_MLP, *tensors.experts(), *tensors.shared_experts()),
    ignored=("pretraining_tp", "ep_size", "auto_map", "router_aux_loss_coef"),
)  # fmt: skip
