"""Text from a Hugging Face folder by transformers alone, on the CPU in fp32. It shows what an export gives to its users.

In: a folder (an export, or a download), prompts. Out: the continuation of each prompt. No code of the folder is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from configs.errors import ConfigError, Problem
from pretrain.run.process import importing
from tools.convert.hf_config.preset import read_config
from tools.convert.tokenizer_files import SENTENCEPIECE_FILE

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", SENTENCEPIECE_FILE, "vocab.json")


def generate_exported(
    folder: Path, prompts: list[str], max_new_tokens: int, temperature: float, top_k: int | None, seed: int
) -> dict[str, Any]:
    """{"huggingface", "texts": [{"prompt", "text", "token_ids", "ended"}]}. Raises ConfigError."""
    tokenizer, model = load_exported(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        end = model.generation_config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end}
        if ids.shape[1] == 0:
            ids = torch.tensor([[tokenizer.eos_token_id]])
        # Each prompt has its own random numbers, so that its continuation does not depend on the other prompts.
        torch.manual_seed(seed)
        drawing = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0} if temperature else {"do_sample": False}
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **drawing)
        drawn = whole[0, ids.shape[1] :].tolist()
        ended = bool(drawn) and drawn[-1] in ends
        answer = _decode(tokenizer, drawn)
        texts.append({"prompt": prompt, "text": answer, "token_ids": drawn, "ended": ended})
    return {"huggingface": str(folder), "texts": texts}


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of the ids. transformers 5 decodes only approximately when a class runs sentencepiece; sentencepiece is exact."""
    processor = getattr(tokenizer, "sp_model", None)
    if processor is None:
        return tokenizer.decode(ids, skip_special_tokens=True)
    special = set(tokenizer.all_special_ids)
    return processor.decode([token for token in ids if token not in special])


def load_exported(folder: Path) -> tuple[Any, Any]:
    """(tokenizer, model) as transformers loads them.

    Raises ConfigError, also when transformers misses tensors or finds tensors that the model doesn't have.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with importing():
        from transformers import (  # noqa: PLC0415  (3 s; the environment comes first)
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            BertGenerationTokenizer,
        )
        from transformers.utils import logging  # noqa: PLC0415

    config = read_config(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        # Without these files transformers would make an empty tokenizer.
        rule = f"must hold a tokenizer: one of {', '.join(_TOKENIZERS)}"
        raise ConfigError(Problem("HF_DIR", str(folder), rule, "add its tokenizer's files"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Without False, transformers would ask on the terminal whether to run the folder's code.
        only_data = {"local_files_only": True, "trust_remote_code": False}
        # AutoTokenizer of transformers 5 ignores the class that an export names for some values of model_type.
        runs_sentencepiece = (folder / SENTENCEPIECE_FILE).is_file() and not (folder / "tokenizer.json").is_file()
        kind: Any = BertGenerationTokenizer if runs_sentencepiece else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, **only_data)
        settings = AutoConfig.from_pretrained(folder, **only_data)
        # transformers' default for experts, a grouped product, takes only widths that are multiples of 16 bytes.
        settings._experts_implementation = "eager"
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=settings, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **only_data
        )
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        rule = f"must be a model that transformers loads: {' '.join(str(error).split())[:300]}"
        raise ConfigError(
            Problem("HF_DIR", str(folder), rule, "export it again: phalanx convert export CHECKPOINT HF_DIR")
        ) from error
    model, found = loaded
    # transformers' model leaves MTP layers to another class, and ignores only those of the published models.
    depths = _prediction_depths(config)
    kept = {
        kind: sorted(name for name in map(str, names) if kind != "unexpected_keys" or not name.startswith(depths))
        for kind, names in found.items()
        if kind != "error_msgs"
    }
    wrong = {kind: names for kind, names in kept.items() if names}
    if wrong:
        rule = f"must hold the tensors of its config.json: {wrong}"
        raise ConfigError(Problem("HF_DIR", str(folder), rule, "export it again: phalanx convert export CHECKPOINT HF_DIR"))
    return tokenizer, model.eval()


def _prediction_depths(config: dict[str, Any]) -> tuple[str, ...]:
    """The beginnings of the names of all MTP tensors."""
    layers, depths = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if not isinstance(layers, int) or not isinstance(depths, int):
        return ()
    return tuple(f"model.layers.{layer}." for layer in range(layers, layers + depths))
