"""All model families, and the lookup of one: by the config.json of an import, or by the model of an export."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from tools.convert.families.bailing_moe_v2 import BAILING_MOE_V2
from tools.convert.families.deepseek_v2 import DEEPSEEK_V2
from tools.convert.families.deepseek_v3 import DEEPSEEK_V3
from tools.convert.families.deepseek_v32 import DEEPSEEK_V32
from tools.convert.families.dots1 import DOTS1
from tools.convert.families.ernie4_5_moe import ERNIE4_5_MOE
from tools.convert.families.exaone4 import EXAONE4
from tools.convert.families.exaone_moe import EXAONE_MOE
from tools.convert.families.glm4_moe import GLM4_MOE
from tools.convert.families.glm4_moe_lite import GLM4_MOE_LITE
from tools.convert.families.glm_moe_dsa import GLM_MOE_DSA
from tools.convert.families.gpt_oss import GPT_OSS
from tools.convert.families.hunyuan_v1 import HUNYUAN_V1_DENSE, HUNYUAN_V1_MOE
from tools.convert.families.hy_v3 import HY_V3
from tools.convert.families.llama import LLAMA, MISTRAL
from tools.convert.families.llama4 import LLAMA4
from tools.convert.families.minimax_m2 import MINIMAX_M2
from tools.convert.families.mixtral import MIXTRAL
from tools.convert.families.olmo2 import OLMO2, OLMO3
from tools.convert.families.olmoe import FLEX_OLMO, OLMOE
from tools.convert.families.phi3 import PHI3
from tools.convert.families.qwen2 import QWEN2
from tools.convert.families.qwen2_moe import QWEN2_MOE
from tools.convert.families.qwen3 import QWEN3
from tools.convert.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from tools.convert.families.qwen3_moe import QWEN3_MOE
from tools.convert.families.qwen3_next import QWEN3_NEXT
from tools.convert.families.smollm3 import SMOLLM3
from tools.convert.hf_config.family import Family
from tools.convert.hf_config.model_differences import model_differences

FAMILIES = (
    QWEN3_MOE, QWEN2_MOE, MIXTRAL, DEEPSEEK_V3, DEEPSEEK_V2, GLM4_MOE, GPT_OSS, QWEN3, LLAMA, MISTRAL, OLMOE, LLAMA4,
    BAILING_MOE_V2, DOTS1, ERNIE4_5_MOE, EXAONE_MOE, GLM4_MOE_LITE, HUNYUAN_V1_DENSE, HUNYUAN_V1_MOE,
    HY_V3, MINIMAX_M2, QWEN2, PHI3, SMOLLM3,
    QWEN3_NEXT, QWEN3_5_MOE, QWEN3_5, OLMO2, OLMO3, FLEX_OLMO, EXAONE4, DEEPSEEK_V32, GLM_MOE_DSA,
)  # fmt: skip

UNSUPPORTED = {
    "bailing_hybrid": "its linear attention (KDA) has no module in megatron-core",
    "longcat_flash": "it has two attentions a layer and experts that copy their input, megatron-core neither",
    "mimo_v2_flash": "its layers with a window have more key heads, sinks and another rotary base than the others",
    "olmo": "its norms have no weights",
    "phi": "its attention and MLP run side by side, and its output layer has a bias",
    "phimoe": "its router chooses experts one after the other (SparseMixer)",
}
"""model_type -> why its layers can't be built. Names that are often asked for; others are unknown."""


def family_named(name: str, key: str = "--family") -> Family:
    """The family with this name or model_type. Raises ConfigError, with `key` as the key of the problem."""
    for family in FAMILIES:
        if name == family.name or name in family.model_types:
            return family
    if name in UNSUPPORTED:
        raise ConfigError(Problem(key, name, f"can't be built: {UNSUPPORTED[name]}", "take a model of another family"))
    names = [family.name for family in FAMILIES]
    close = difflib.get_close_matches(str(name), names, n=1)
    fix = f"did you mean {close[0]}?" if close else "families are " + ", ".join(names)
    raise ConfigError(Problem(key, name, "must be a family that is known here", fix))


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's section of a multimodal config.json (Kimi-K2.5, Llama 4), else the whole config."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and "hidden_size" not in config else config


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its model_type. Raises ConfigError."""
    model_type = text_part(config).get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(Problem("config.json: model_type", model_type, "must be there", "give a Hugging Face config.json"))
    return family_named(model_type, "config.json: model_type")


def family_for(model: Model) -> Family:
    """The first family whose config.json can express every key of the model.

    Raises ConfigError with the reason of each family when there is none.
    """
    reasons = []
    for family in FAMILIES:
        if family.planning_only:
            continue
        try:
            hf_config = family.to_hf_config(model)
        except ConfigError as error:
            reasons.append(error.problems[0].rule.removeprefix("must be a model of the family "))
            continue
        again, problems = family.to_model(hf_config)
        different = model_differences(model, again)
        if not problems and not different:
            return family
        reasons.append(f"{family.name}: " + "; ".join([*different, *(problem.rule for problem in problems)]))
    rule = "must be a model that a family can hold: " + " | ".join(reasons)
    raise ConfigError(Problem("model", model.name, rule, "keep it as a Phalanx checkpoint"))
