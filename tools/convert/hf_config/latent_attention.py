"""Multi-head latent attention in config.json (DeepSeek-V2, arXiv 2405.04434). Source: transformers models/deepseek_v3.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Setting
from tools.convert.hf_config.settings import plain_attention


def latent_attention(q_lora_rank: int = 1536, *decided: str) -> tuple[Setting, ...]:
    """The settings of multi-head latent attention. `q_lora_rank`: the value of an absent key. `decided`: model keys that other
    settings of the family set.
    """
    return (
        ConfigKey("kv_lora_rank", "mla.kv_lora_rank"),
        ConfigKey("q_lora_rank", "mla.q_lora_rank", q_lora_rank),
        ConfigKey("qk_nope_head_dim", "mla.qk_nope_head_dim"),
        ConfigKey("qk_rope_head_dim", "mla.qk_rope_head_dim"),
        ConfigKey("v_head_dim", "mla.v_head_dim"),
        AllowedValues("attention_bias", (False, None), "megatron-core's latent attention has no biases"),
        LatentHeads(),
        LatentEps(),
        *plain_attention("mla.kv_lora_rank", "mtp.num_layers", *decided),
    )


@dataclass(frozen=True)
class LatentHeads:
    """num_key_value_heads, which equals the number of query heads; head_dim, the rotary width or 0; qk_head_dim, the width of a
    whole key.
    """

    def names(self) -> tuple[str, ...]:
        return ("num_key_value_heads", "head_dim", "qk_head_dim")

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        heads = hf_config.get("num_key_value_heads")
        if heads not in (None, model.attention.num_heads):
            rule = f"must equal num_attention_heads = {model.attention.num_heads} with latent attention"
            yield Problem("config.json: num_key_value_heads", heads, rule, "mend the config.json")
        rotated, whole = model.mla.qk_rope_head_dim, arch.query_dim(model)
        for name, width, meaning in (("head_dim", rotated, "qk_rope_head_dim"), ("qk_head_dim", whole, "both parts of a key")):
            if hf_config.get(name) not in (None, 0, width):
                rule = f"must equal {meaning} = {width}: transformers rotates and scales by it"
                yield Problem(f"config.json: {name}", hf_config[name], rule, "mend the config.json, or leave it out")

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        hf_config["num_key_value_heads"] = model.attention.num_heads
        if arch.is_mla(model):
            hf_config["head_dim"] = model.mla.qk_rope_head_dim
        return iter(())


@dataclass(frozen=True)
class LatentEps:
    """The epsilon of the norms of the compressed query and key. transformers fixes it at 1e-6, whatever rms_norm_eps is."""

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        model.mla.norm_eps = 1e-6
        return iter(())

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        if (model.mla.norm_eps or model.norm_eps) != 1e-6:
            yield f"model.mla.norm_eps = {model.mla.norm_eps or model.norm_eps}, it has 1e-6 only"
