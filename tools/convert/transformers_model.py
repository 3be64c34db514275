"""A Hugging Face folder as transformers' own model, in fp32 on the CPU: the logits that a conversion is held against.

In: the folder and its config.json. Out: logits, of the model and of its prediction depths (MTP).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from pretrain.run.process import importing
from tools.convert.families import family_of, text_part


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


def transformers_logits(
    hf: Path, config: dict[str, Any], tokens: torch.Tensor, layers: int, depths: int = 0
) -> list[torch.Tensor]:
    """Logits [b, s, vocab] of the folder's model, of its first `layers` layers; then those of each prediction depth.

    Depth k predicts the token after the next k from the first s - k positions: [b, s - k, vocab]. Raises ConfigError when the
    folder can't be loaded.
    """
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
            found = model.eval()(tokens, use_cache=False, output_hidden_states=depths > 0)
            return [found.logits.float(), *(_depth_logits(model, tokens, found.hidden_states[-1], depths) if depths else [])]
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_loaded(hf, error) from error


def depths_obstacle(config: dict[str, Any], theirs: Model, layers: int) -> str:
    """Why transformers can't compute the prediction depths of this folder; empty: it can."""
    import transformers  # noqa: PLC0415  (3 s)

    if not hasattr(transformers.modeling_layers, "MtpModel"):
        return f"transformers {transformers.__version__} has no model of them"
    if theirs.mtp.num_layers == 0:
        return "its config.json names none"
    if layers < theirs.num_layers:
        return "they follow the last layer, and --layers leaves it out"
    if isinstance(config.get("quantization_config"), dict):
        return "transformers reads them from unquantized files only"
    return ""


def _depth_logits(model: Any, tokens: torch.Tensor, hidden: torch.Tensor, depths: int) -> list[torch.Tensor]:
    """The logits of each prediction depth by transformers' own model of them. `hidden` [b, s, h]: after the final norm."""
    from transformers import modeling_layers  # noqa: PLC0415  (3 s)
    from transformers.cache_utils import MtpCache  # noqa: PLC0415

    last = model.config.num_hidden_layers
    # transformers finds the tensors of depths by patterns that name the layers of published models only.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\." for layer in range(last, last + depths)]
    if hasattr(model.config, "linear_num_key_heads"):
        _teach_qwen_depth(model)
    elif not hasattr(model.config, "num_mtp_layers"):
        # GLM-4.7-Flash, whose configuration class doesn't name the depths. Their layers are those of its MoE layers.
        model.config.num_mtp_layers, model.config.mtp_mlp_layer_types = depths, ["sparse"] * depths
    depth_model = modeling_layers.MtpModel.from_pretrained(model).eval()  # type: ignore[attr-defined]
    found = []
    for depth in range(depths):
        # Each depth sees one token more, and its positions count from there.
        hidden = depth_model.forward_layer(
            depth,
            hidden[:, : tokens.shape[1] - depth - 1],
            torch.arange(depth + 1, tokens.shape[1])[None].expand(tokens.shape[0], -1),
            MtpCache(config=model.config.get_mtp_config()),
            input_ids=tokens[:, depth + 1 :],
        )
        found.append(depth_model._project_to_logits(hidden).float())
    return found


def _teach_qwen_depth(model: Any) -> None:
    """Qwen3-Next's and Qwen3.5's depth, which transformers' own model of depths computes once it knows the names and the kind."""
    from transformers.core_model_loading import WeightRenaming  # noqa: PLC0415  (3 s)

    model.config.num_mtp_layers, model.config.mtp_layer_types = 1, ["full_attention"]
    model._keys_to_ignore_on_load_unexpected = [r"^mtp\."]
    names = {
        "mtp.layers.0.": "layers.0.mtp_block.", "mtp.pre_fc_norm_embedding.": "layers.0.enorm.",
        "mtp.pre_fc_norm_hidden.": "layers.0.hnorm.", "mtp.fc.": "layers.0.eh_proj.", "mtp.norm.": "layers.0.post_norm.",
    }  # fmt: skip
    renames = [WeightRenaming(source_patterns=f"^{re.escape(one)}", target_patterns=other) for one, other in names.items()]
    model._weight_conversions = [*renames, *(getattr(model, "_weight_conversions", None) or [])]
