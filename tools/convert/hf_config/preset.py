"""config.json -> `model` section, and `model` section -> preset file.

In: a config.json, or a Model. Out: a Model with the problems and notes of the translation; or YAML with the keys that differ
from the defaults.

Torch-free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from pretrain.run.files import storage_problem
from tools.convert.families import family_of, text_part
from tools.convert.hf_config.family import Family

# Keys of config.json that don't describe the architecture, or describe only how transformers runs it.
HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "auto_map", "quantization_config", "id2label",
    "label2id", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder", "chunk_size_feed_forward",
    "problem_type", "layer_types", "max_window_layers", "attn_implementation", "_attn_implementation", "torchscript",
    "use_bfloat16", "pruned_heads", "tie_encoder_decoder", "num_labels", "cross_attention_hidden_size",
    "add_cross_attention", "is_decoder", "finetuning_task", "prefix", "task_specific_params", "tf_legacy_loss",
    "bos_token", "eos_token", "pretraining_tp", "ep_size", "unsloth_fixed", "unsloth_version", "compression_config",
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a config.json, named directly or by its folder. Raises ConfigError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        value = json.loads(file.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError as error:
        fix = "name a Hugging Face model's folder, or its config.json"
        raise ConfigError(Problem(str(path), "no config.json", "must hold a config.json", fix)) from error
    except OSError as error:
        raise ConfigError(storage_problem("config.json", file, error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(Problem(str(file), str(error)[:120], "must be JSON", "download the file again")) from error
    if not isinstance(value, dict):
        raise ConfigError(Problem(str(file), type(value).__name__, "must be a JSON object", "download the file again"))
    return value


def _finite(text: str) -> float:
    """A JSON number. Raises ValueError for NaN and infinity, which Python reads though they are not JSON."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def interpret_config(config: Mapping[str, Any]) -> tuple[Family, Model, list[Problem], list[str]]:
    """(family, model, problems, notes) of a config.json. Raises ConfigError for an unknown family."""
    family, hf_config = family_of(config), text_part(config)
    model, problems = family.to_model(hf_config)
    notes = []
    for name in sorted(set(hf_config) - family.known() - HARMLESS):
        if hf_config[name] not in (None, False, 0, 0.0, [], {}):
            notes.append(f"config.json: {name} = {hf_config[name]!r} is unknown for the family {family.name} and was ignored")
    return family, model, problems, notes if problems else [*notes, *family.notes(hf_config, model)]


def preset_yaml(model: Model, header: str = "") -> str:
    """The YAML text of a preset: the keys that differ from the defaults, in the order of the schema."""
    tree = {"model": _changed(model, Model())}
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=130)
    return "".join(f"# {line}\n" for line in header.splitlines()) + text


def _changed(section: Any, default: Any) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for item in fields(section):
        value, other = getattr(section, item.name), getattr(default, item.name)
        if is_dataclass(value):
            inner = _changed(value, other)
            changed |= {item.name: inner} if inner else {}
        elif value != other:
            # yaml.safe_dump writes 1.0e-06, with a point: YAML 1.1 would read 1e-06 as text.
            changed[item.name] = value
    return changed
