"""Settings that several families share. Each family's file combines them.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config.family import REQUIRED, AllowedValues, ConfigKey, FixedValue, Setting, wrong_value

# silu and swish are two names of one function.
PLAIN_MLP = AllowedValues("hidden_act", ("silu", "swish"), "its experts and MLPs are SwiGLU")


@dataclass(frozen=True)
class KeyValueHeads:
    """num_key_value_heads; null means as many as query heads. `default`: the value of an absent key (None: like null)."""

    default: int | None

    def names(self) -> tuple[str, ...]:
        return ("num_key_value_heads",)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        value = hf_config.get("num_key_value_heads", self.default)
        wrong = None if value is None else wrong_value("num_key_value_heads", value, "attention.num_query_groups")
        if wrong:
            yield wrong
            return
        model.attention.num_query_groups = value

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config["num_key_value_heads"] = arch.num_query_groups(model)
        return iter(())


def decoder(
    eps: float,
    kv_heads: KeyValueHeads | None = None,
    tied: bool = False,
    ffn: str | None = "ffn_hidden_size",
    norm: str = "rmsnorm",
    norm_position: str = "before",
) -> tuple[Setting, ...]:
    """The keys that every decoder has.

    `eps`, `tied`: values of absent keys. `ffn`: the model key of intermediate_size. `kv_heads`: None with latent attention.
    """
    settings: list[Setting] = [
        ConfigKey("vocab_size", "vocab_size"),
        ConfigKey("hidden_size", "hidden_size"),
        ConfigKey("num_hidden_layers", "num_layers"),
        ConfigKey("num_attention_heads", "attention.num_heads"),
        ConfigKey("rms_norm_eps", "norm_eps", eps, float),
        ConfigKey("tie_word_embeddings", "tie_embeddings", tied, bool),
        ConfigKey("max_position_embeddings", "max_position_tokens", None),
        ConfigKey("attention_dropout", "attention.dropout", 0.0, float),
        AllowedValues("is_causal", (None, True), "a token that attends to later ones can't be trained"),
        AllowedValues("per_layer_config", (None, {}), "values that differ from layer to layer can't be read from there"),
        FixedValue("norm", norm),
        FixedValue("norm_position", norm_position),
        FixedValue("hidden_dropout", 0.0),
    ]
    settings += [kv_heads] if kv_heads else []
    settings += [ConfigKey("intermediate_size", ffn)] if ffn else []
    return tuple(settings)


@dataclass(frozen=True)
class HeadDim:
    """head_dim. `absent`: the value of an absent key (None: hidden_size / num_attention_heads)."""

    absent: int | None = None

    def names(self) -> tuple[str, ...]:
        return ("head_dim",)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        value = hf_config.get("head_dim", self.absent)
        wrong = None if value is None else wrong_value("head_dim", value, "attention.head_dim")
        if wrong:
            yield wrong
            return
        # Megatron-Core needs the value; transformers uses hidden_size / heads.
        heads, sound = model.attention.num_heads, hf_config.get("hidden_size") == model.hidden_size
        if value is None and model.hidden_size % heads:
            # A wrong hidden_size has a problem of its own.
            rule = f"must be present: {model.hidden_size} / {heads} is not an integer"
            yield from [Problem("config.json: head_dim", None, rule, "state it")] if sound else []
            return
        model.attention.head_dim = value or model.hidden_size // heads

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config["head_dim"] = arch.head_dim(model)
        return iter(())


@dataclass(frozen=True)
class DenseFirst:
    """first_k_dense_replace: the number of dense layers at the bottom. All later layers are MoE layers."""

    absent: int

    def names(self) -> tuple[str, ...]:
        return ("first_k_dense_replace",)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        value = hf_config.get("first_k_dense_replace", self.absent)
        wrong = wrong_value("first_k_dense_replace", value, "moe.first_dense_layers")
        if wrong:
            yield wrong
            return
        model.moe.first_dense_layers = value

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        kinds = arch.moe_layers(model)
        dense = kinds.index(True) if True in kinds else len(kinds)
        if not all(kinds[dense:]) or not any(kinds):
            yield f"its MoE layers follow the dense ones at the bottom, these are {''.join('x' if k else '.' for k in kinds)}"
        hf_config["first_k_dense_replace"] = dense


@dataclass(frozen=True)
class SparsePattern:
    """decoder_sparse_step and mlp_only_layers (Qwen): layer i is an MoE layer when mlp_only_layers doesn't list it and i + 1 is a
    multiple of decoder_sparse_step.
    """

    def names(self) -> tuple[str, ...]:
        return ("decoder_sparse_step", "mlp_only_layers")

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        step, dense = hf_config.get("decoder_sparse_step", 1), hf_config.get("mlp_only_layers") or []
        wrong = wrong_value("decoder_sparse_step", step, "moe.layer_frequency")
        if wrong:
            yield wrong
            return
        if not isinstance(dense, list) or not all(type(i) is int for i in dense):
            yield Problem("config.json: mlp_only_layers", dense, "must be a list of layers", "mend the config.json")
            return
        pattern = [int(i not in dense and (i + 1) % step == 0) for i in range(model.num_layers)]
        model.moe.layer_pattern = None if all(pattern) else pattern

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config["decoder_sparse_step"] = 1
        hf_config["mlp_only_layers"] = [i for i, is_moe in enumerate(arch.moe_layers(model)) if not is_moe]
        if not arch.is_mla(model) and model.moe.num_experts == 0:
            yield "it has experts"


@dataclass(frozen=True)
class AllSparse:
    """Every layer is an MoE layer. No key of config.json."""

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        return iter(())

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        if model.moe.num_experts == 0 or not all(arch.moe_layers(model)):
            yield "all of its layers have experts"


@dataclass(frozen=True)
class SharedExperts:
    """`hf_key` experts of moe_intermediate_size each, built as one MLP. `absent`: transformers' default.

    `optional`: the family also has models without them.
    """

    absent: int
    hf_key: str = "n_shared_experts"
    optional: bool = False

    def names(self) -> tuple[str, ...]:
        return (self.hf_key,)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        count = hf_config.get(self.hf_key, self.absent) or 0
        if type(count) is not int or count < 0:
            yield Problem(f"config.json: {self.hf_key}", count, "must be an int from 0 on", "mend the config.json")
            return
        model.moe.shared_ffn_hidden_size = count * arch.expert_ffn(model) or None

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        width, one = model.moe.shared_ffn_hidden_size or 0, arch.expert_ffn(model)
        if (width == 0 and not self.optional) or width % one:
            yield f"model.moe.shared_ffn_hidden_size = {width} must be a multiple of an expert's {one}"
        hf_config[self.hf_key] = width // one


@dataclass(frozen=True)
class ExpertGroups:
    """n_group and topk_group. `absent`: values of absent keys. `scored`: best experts of a group that make its score."""

    absent: tuple[int, int]
    scored: int = 2

    def names(self) -> tuple[str, ...]:
        return ("n_group", "topk_group")

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        stated = (hf_config.get(name, absent) for name, absent in zip(self.names(), self.absent))
        groups, chosen = (1 if value is None else value for value in stated)
        wrong = wrong_value("n_group", groups, "moe.router.num_groups")
        wrong = wrong or wrong_value("topk_group", chosen, "moe.router.group_top_k")
        if wrong:
            yield wrong
            return
        if groups == chosen:
            # A token may use every group.
            return
        model.moe.router.num_groups, model.moe.router.group_top_k = groups, chosen
        if arch.group_score_experts(model) != self.scored:
            model.moe.router.group_score_experts = self.scored

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        router = model.moe.router
        hf_config["n_group"], hf_config["topk_group"] = router.num_groups or 1, router.group_top_k or 1
        if router.num_groups != router.group_top_k and arch.group_score_experts(model) != self.scored:
            yield f"it scores a group by its best {self.scored}, not {arch.group_score_experts(model)}"


@dataclass(frozen=True)
class NoExperts:
    """A dense family. No key of config.json."""

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        return iter(())

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        if model.moe.num_experts:
            yield "it has no experts"


@dataclass(frozen=True)
class WholeHeads:
    """transformers refuses a Llama whose hidden_size is not a multiple of its heads, whatever head_dim is."""

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        return iter(())

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        if model.hidden_size % model.attention.num_heads:
            yield f"transformers wants hidden_size = {model.hidden_size} to be a multiple of {model.attention.num_heads} heads"


def plain_attention(*decided: str, **changed: Any) -> tuple[Setting, ...]:
    """No latent attention, window, sinks, biases or query/key norms, no MTP, SwiGLU; `changed` values instead.

    `decided`: model keys that other settings of the family set.
    """
    values = {
        "mla.kv_lora_rank": None, "attention.window_size_tokens": None, "attention.sinks": False,
        "attention.qkv_bias": False, "attention.output_bias": False, "attention.qk_norm": False, "mlp_bias": False,
        "attention.qk_norm_span": "head", "attention.qk_norm_after_rotation": False, "position.layer_pattern": None,
        "mtp.num_layers": 0, "activation": "swiglu", "attention.output_gate": False, "delta_net.pattern": None,
        "attention.qk_l2_norm": False, "attention.temperature_growth": 0.0, "attention.window_kind": "sliding",
        "position.scaling.layers": "all", "moe.weights_on_input": False, "dsa.top_k": None, **changed,
    }  # fmt: skip
    return tuple(FixedValue(name, value) for name, value in values.items() if name not in decided)


def softmax_router(**changed: Any) -> tuple[Setting, ...]:
    """A router with softmax scores, without groups, biases and scaling; `changed` values instead."""
    values = {
        "moe.router.score": "softmax", "moe.router.num_groups": None, "moe.router.expert_bias": False,
        "moe.router.bias": False, "moe.router.scaling_factor": 1.0, **changed,
    }  # fmt: skip
    return tuple(FixedValue(name, value) for name, value in values.items() if value is not REQUIRED)


def sigmoid_router(normalized: bool = True) -> tuple[Setting, ...]:
    """A router with sigmoid scores and a selection bias. `normalized`: transformers' value of an absent norm_topk_prob."""
    return (
        FixedValue("moe.router.score", "sigmoid"),
        FixedValue("moe.router.expert_bias", True),
        FixedValue("moe.router.bias", False),
        FixedValue("moe.router.normalize_top_k", True),
        FixedValue("moe.shared_gate", False),
        AllowedValues("norm_topk_prob", (True,), "megatron-core always normalises sigmoid scores", absent=normalized),
    )
