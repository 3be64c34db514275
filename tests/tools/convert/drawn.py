"""Odd models of every family, drawn by a seed: rare values, rotary scalings, older and absent keys, forms of files.

A draw may be one that transformers itself can't build; `make_drawn` says so.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.tools.convert.tiny import MODELS, randomize
from tools.convert.hf_config.preset import read_config

FULL, WINDOW = "full_attention", "sliding_attention"
# Key -> values. A family draws from the keys that its configuration class has.
KEYS: dict[str, tuple[Any, ...]] = {
    "vocab_size": (91, 97, 128), "tie_word_embeddings": (True, False), "rms_norm_eps": (1e-2, 1e-4), "attention_dropout": (0.1,),
    "num_key_value_heads": (1, 3, None), "head_dim": (6, 10, 16), "q_lora_rank": (None, 24), "num_experts_per_tok": (2, 4),
    "moe_k": (2, 4), "moe_topk": (2, [3, 3]), "first_k_dense_replace": (0, 2), "decoder_sparse_step": (2,),
    "mlp_only_layers": ([], [0]), "moe_layers": (None, [1]), "interleave_moe_layer_step": (1, 3), "moe_layer_interval": (2,),
    "moe_layer_start_index": (0,), "moe_layer_end_index": (0, -1), "n_group": (1, 2), "topk_group": (1, 2),
    "n_shared_experts": (0, 1, 2), "num_shared_experts": (0, 1, 2), "moe_num_shared_experts": (0, 1),
    "norm_topk_prob": (True, False), "routed_scaling_factor": (1.0, 16.0), "router_scaling_factor": (1.0,),
    "topk_method": ("greedy", "group_limited_greedy"),
    "qkv_bias": (True, False), "use_qk_norm": (True, False), "use_sliding_window": (True, False), "sliding_window": (9, None),
    "max_window_layers": (0, 1, 28), "sliding_window_pattern": (2, 3), "no_rope_layer_interval": (2, 3),
    "attention_chunk_size": (7, 64), "attn_temperature_tuning": (True, False), "floor_scale": (5,),
    "linear_conv_kernel_dim": (2, 4), "linear_num_value_heads": (2, 4), "clip_qkv": (8.0,),
}  # fmt: skip
# Key -> words or numbers, one for each layer.
LAYERS: dict[str, tuple[Any, ...]] = {
    "layer_types": (FULL, WINDOW), "mlp_layer_types": ("dense", "sparse"), "no_rope_layers": (0, 1),
}  # fmt: skip
# The other word of layer_types in these families.
WORDS = {
    "llama4_text": "chunked_attention", "qwen3_next": "linear_attention", "qwen3_5_text": "linear_attention",
    "qwen3_5_moe_text": "linear_attention",
}  # fmt: skip
YARN: dict[str, tuple[Any, ...]] = {
    "beta_fast": (24.0,), "beta_slow": (2.0,), "mscale": (0.7, 1.0, 0), "mscale_all_dim": (0.7, 1.0, 0),
    "attention_factor": (1.3, 0.8), "truncate": (True, False),
}  # fmt: skip


def rotary(draw: random.Random) -> dict[str, Any]:
    """rope_parameters of a drawn kind."""
    kind = draw.choice(["default", "linear", "llama3", "yarn", "yarn", "yarn"])
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": draw.choice([1e3, 5e5])}
    if kind != "default":
        found["factor"] = draw.choice([1.0, 4.0, 8])
    if kind in ("llama3", "yarn") and draw.random() < 0.8:
        found["original_max_position_embeddings"] = draw.choice([16, 40, 400])
    if kind == "llama3":
        found |= {"low_freq_factor": draw.choice([1.0, 1.5]), "high_freq_factor": draw.choice([4.0, 2.0])}
    if kind == "yarn":
        found |= {key: draw.choice(values) for key, values in YARN.items() if draw.random() < 0.4}
    return found


def draw_values(name: str, draw: random.Random) -> dict[str, Any]:
    """The changed keys of the tiny model `name`."""
    model_type, base = MODELS[name]
    config_class: Any = CONFIG_MAPPING[model_type]
    own, num_layers = config_class.__dataclass_fields__, base["num_hidden_layers"]
    skipped = {"num_key_value_heads", "head_dim"} if "kv_lora_rank" in base or base["num_attention_heads"] != 6 else set()
    skipped |= {"rms_norm_eps"} if "linear_conv_kernel_dim" in base else set()
    keys = {key: values for key, values in KEYS.items() if key in own and key not in skipped and draw.random() < 0.3}
    changed = {key: draw.choice(values) for key, values in keys.items()}
    for key, words in LAYERS.items():
        if key in own and draw.random() < 0.3:
            words = (FULL, WORDS.get(model_type, WINDOW)) if key == "layer_types" else words
            changed[key] = [draw.choice(words) for _ in range(num_layers)]
    if "mlp_bias" in own and draw.random() < 0.3:
        changed |= {"attention_bias": True, "mlp_bias": True}
    if draw.random() < 0.6:
        both = {FULL: rotary(draw), WINDOW: {"rope_type": "default", "rope_theta": 5e5}}
        changed["rope_parameters"] = both if model_type == "olmo3" else rotary(draw)
    return changed


def make_drawn(name: str, seed: int, folder: Path) -> str | None:
    """Save a drawn model into `folder`. Returns the form of its files; None where transformers refuses the model."""
    draw = random.Random(f"{name}/{seed}")
    model_type, base = MODELS[name]
    config_class: Any = CONFIG_MAPPING[model_type]
    changed = draw_values(name, draw)
    try:
        config = config_class(**{**base, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changed})
        config._experts_implementation = "eager"
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
        with torch.no_grad():
            model(torch.arange(60)[None])
    except (StrictDataclassError, ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    randomize(model, seed)
    form = draw.choice(["plain", "plain", "shards", "bf16", "a tied table twice"])
    model.save_pretrained(folder, max_shard_size="20KB" if form == "shards" else "1GB")
    _edit_config(folder / "config.json", config_class, draw)
    if form in ("bf16", "a tied table twice"):
        file = folder / "model.safetensors"
        held = load_file(file)
        if form == "bf16":
            held = {key: value if key.endswith("bias") else value.bfloat16() for key, value in held.items()}
        else:
            held.setdefault("lm_head.weight", held["model.embed_tokens.weight"].clone())
        save_file(held, file, metadata={"format": "pt"})
    return form


def _edit_config(path: Path, config_class: Any, draw: random.Random) -> None:
    """Rewrite rotary positions in the keys of transformers 4, or leave keys out that have their default, or both."""
    config = read_config(path)
    if draw.random() < 0.4 and FULL not in config["rope_parameters"]:
        scaling = config.pop("rope_parameters")
        config |= {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
        config["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling} if scaling["rope_type"] != "default" else None
    if draw.random() < 0.4:
        default = config_class().to_dict() | {"model_type": None}
        stays = [key for key, value in config.items() if default.get(key, ...) != value or draw.random() < 0.3]
        config = {key: config[key] for key in stays}
    path.write_text(json.dumps(config))
