"""Verification of a conversion: logits of the Megatron-Core model and of transformers' model on the same tokens, in fp32 on CPU.

In: a checkpoint, a Hugging Face folder. Out: {"ok", "max_abs_diff", "argmax_agreement", …}. The two sides share no code of
Phalanx: transformers reads the folder, Megatron-Core reads the checkpoint.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from pretrain.run.process import importing
from tools.convert.checkpoints import find_checkpoint, model_of, open_manifest
from tools.convert.families import family_of, text_part
from tools.convert.hf_config.model_differences import model_differences
from tools.convert.hf_config.preset import interpret_config, read_config
from tools.convert.megatron_model import loaded_model, logits_of

AGREEMENT = 0.99
"""Smallest share of tokens whose most likely next token must agree. Ties and rounding may change a few."""


def verify(path: Path, hf: Path, layers: int | None, sequences: int, length_tokens: int, tolerance: float) -> dict[str, Any]:
    """Compare the logits of the two models on random tokens.

    `ok`: the largest difference is within `tolerance`, which is scaled up for logits beyond 10, and AGREEMENT is reached.
    Raises ConfigError.
    """
    folder = find_checkpoint(path)
    model = model_of(open_manifest(folder))
    config = read_config(hf)
    _, theirs, problems, _ = interpret_config(config)
    fix = "name the folder it came from"
    if theirs.vocab_size != model.vocab_size:
        rule = f"must have the checkpoint's {model.vocab_size} tokens"
        problems.append(Problem("config.json: vocab_size", theirs.vocab_size, rule, fix))
    if theirs.num_layers != model.num_layers:
        rule = f"must have the checkpoint's {model.num_layers} layers"
        problems.append(Problem("config.json: num_hidden_layers", theirs.num_layers, rule, fix))
    if problems:
        raise ConfigError(problems)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.vocab_size or 1, (sequences, length_tokens), generator=generator)
    kept = min(layers or model.num_layers, model.num_layers)
    expected = transformers_logits(hf, config, tokens, kept)
    with loaded_model(folder, model, length_tokens, kept) as chunk:
        got = logits_of(chunk, tokens)
    difference = (got - expected).abs()
    largest, scale = float(difference.max()), float(expected.abs().max())
    agreement = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
    within = largest <= tolerance * max(1.0, scale / 10)
    notes = [f"the configs differ: {text}" for text in model_differences(_without_depths(model), _without_depths(theirs))]
    if model.mtp.num_layers:
        notes.append(
            f"not compared: the {model.mtp.num_layers} prediction depths of the checkpoint; transformers has no model of them. "
            "An export writes them back bit for bit"
        )
    return {
        "ok": bool(within and agreement >= AGREEMENT),
        "max_abs_diff": largest,
        "mean_abs_diff": float(difference.mean()),
        "max_abs_logit": scale,
        "argmax_agreement": agreement,
        "tolerance": tolerance,
        "tokens": tokens.numel(),
        "layers": kept,
        "layers_total": model.num_layers,
        "mtp_layers_not_compared": model.mtp.num_layers,
        "notes": notes,
    }


def _without_depths(model: Model) -> Model:
    return replace(model, mtp=replace(model.mtp, num_layers=0))


def dequantized(hf: Path, block: list[int], layers: int) -> dict[str, torch.Tensor]:
    """The first `layers` layers of an fp8 folder in bf16, by torch's own types. It uses no code of the import (dtypes.py)."""
    files = {}
    for path in sorted(hf.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    state = {}
    for name, path in files.items():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if name.endswith("_scale_inv") or (match and int(match[1]) >= layers):
            continue
        with safe_open(path, framework="pt") as file:
            state[name] = file.get_tensor(name)
        if state[name].dtype == torch.float8_e4m3fn:
            with safe_open(files[f"{name}_scale_inv"], framework="pt") as file:
                factors = file.get_tensor(f"{name}_scale_inv")
            rows, columns = state[name].shape
            wide = factors.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
            state[name] = (state[name].float() * wide).to(torch.bfloat16)
    return state


def _not_loaded(hf: Path, error: Exception) -> ConfigError:
    rule = f"must be a model that transformers runs: {' '.join(str(error).split())[:300]}"
    return ConfigError(Problem("HF_DIR", str(hf), rule, "name the folder that the checkpoint came from, or its export"))


def transformers_logits(hf: Path, config: dict[str, Any], tokens: torch.Tensor, layers: int) -> torch.Tensor:
    """Logits [b, s, vocab] of the folder's model, of its first `layers` layers. Raises ConfigError when it can't be loaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with importing():
        from transformers import (  # noqa: PLC0415  (3 s; the environment comes first)
            CONFIG_MAPPING,
            MODEL_FOR_CAUSAL_LM_MAPPING,
            AutoConfig,
            AutoModelForCausalLM,
        )
        from transformers.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if "model_type" in config and config["model_type"] not in CONFIG_MAPPING:
            # The type is another name (kimi_k2) of one that transformers has. The folder's own code is not run.
            values = {name: value for name, value in text_part(config).items() if name not in ("model_type", "auto_map")}
            settings = AutoConfig.for_model(family_of(config).model_types[0], **values)
        else:
            settings = AutoConfig.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise _not_loaded(hf, error) from error
    # transformers' default for experts, a grouped product, takes only widths that are multiples of 16 bytes.
    settings._experts_implementation = "eager"
    settings.num_hidden_layers = layers
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:layers]
    options: dict[str, Any] = {
        "config": settings,
        "dtype": torch.float32,
        "attn_implementation": "eager",
    }
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") == "fp8":
        # transformers computes with fp8 on GPUs only. The dequantized values are loaded instead.
        delattr(settings, "quantization_config")
        state = dequantized(hf, quantized.get("weight_block_size") or [128, 128], layers)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
        place, options = None, options | {"state_dict": state}
    else:
        kind, place = AutoModelForCausalLM, hf
    try:
        model, found = kind.from_pretrained(place, local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(hf, error) from error
    if found["missing_keys"]:
        # transformers would initialize missing tensors at random.
        raise _not_loaded(hf, ValueError(f"the files lack {sorted(map(str, found['missing_keys']))[:6]}"))
    try:
        with torch.no_grad():
            return model.eval()(tokens, use_cache=False).logits.float()
    except RuntimeError as error:
        raise _not_loaded(hf, error) from error
