"""Tokenizer and generation files of an exported model, with which transformers generates text.

In: a checkpoint's manifest and folder, an optional tokenizer. Out: files in a folder, and the ids of special tokens.

Torch-free.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from configs import schema
from configs.errors import ConfigError, Problem
from pretrain.checkpoint.manifest import Manifest
from pretrain.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, section_for
from pretrain.run.files import write_json
from tools.data.tokenizer_json import to_huggingface

COMPANIONS = "huggingface"
KEPT = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "special_tokens_map.json", "merges.txt", "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def find_tokenizer(manifest: Manifest, folder: Path, named: str | None) -> Tokenizer | None:
    """The tokenizer that is named, else the run's, else the one that was imported with the model; None without any of them.

    Raises ConfigError.
    """
    if named:
        tokenizer = load_tokenizer(section_for(named), "--tokenizer")
        _same(tokenizer, manifest, named)
        return tokenizer
    section = manifest.config.get("data", {}).get("tokenizer", {})
    if section.get("path") and Path(section["path"]).is_file():
        tokenizer = load_tokenizer(schema.Tokenizer(section.get("kind", "sentencepiece"), section["path"], section.get("eod")))
        _same(tokenizer, manifest, section["path"])
        return tokenizer
    own = folder / COMPANIONS / "tokenizer.json"
    if own.is_file():
        try:
            return load_tokenizer(schema.Tokenizer(kind="huggingface", path=str(own)))
        except ConfigError:
            # A tokenizer without an end-of-document token can't be used here. Its files are still copied.
            return None
    return None


def _same(tokenizer: Tokenizer, manifest: Manifest, path: str) -> None:
    wanted = (manifest.tokenizer or {}).get("sha256")
    if wanted and wanted != tokenizer.sha256:
        rule = f"must be the tokenizer of the checkpoint (sha256 {wanted[:12]}…)"
        raise ConfigError(Problem("--tokenizer", path, rule, "name that file: --tokenizer PATH"))
    if tokenizer.vocab_size > manifest.vocab_size:
        rule = f"must have at most the {manifest.vocab_size} tokens of the model"
        raise ConfigError(Problem("--tokenizer", tokenizer.vocab_size, rule, "name the tokenizer that it was trained with"))


def write_tokenizer(folder: Path, checkpoint: Path, tokenizer: Tokenizer | None) -> list[str]:
    """Write the tokenizer's files into `folder`. Returns notes."""
    companions = checkpoint / COMPANIONS
    if companions.is_dir():
        for name in KEPT:
            if (companions / name).is_file():
                shutil.copyfile(companions / name, folder / name)
        return []
    if tokenizer is None:
        return ["no tokenizer was found: add its files, or name it with --tokenizer PATH"]
    if not isinstance(tokenizer, SentencePieceTokenizer):
        for name in KEPT:
            if (Path(tokenizer.path).parent / name).is_file():
                shutil.copyfile(Path(tokenizer.path).parent / name, folder / name)
        return _write_rest(folder, tokenizer)
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    converted, reason = to_huggingface(tokenizer.proto)
    if converted is None:
        return [f"no tokenizer.json: {reason}; tokenizer.model is there"]
    converted.save(str(folder / "tokenizer.json"))
    return _write_rest(folder, tokenizer)


def _write_rest(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Write tokenizer_config.json and generation_config.json unless they exist."""
    eos = tokenizer.token(tokenizer.eod_id)
    if not (folder / "tokenizer_config.json").exists():
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", config)
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.eod_id})
    return []


def special_ids(checkpoint: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """bos, eos and pad ids for config.json: those of the import, else the end-of-document token.

    Absent ids are null: transformers would replace a missing key by its default.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = checkpoint / COMPANIONS / "config.json"
    if own.is_file():
        config = json.loads(own.read_bytes())
        return {name: config[name] for name in names if name in config}
    return {"bos_token_id": None, "eos_token_id": tokenizer.eod_id if tokenizer else None, "pad_token_id": None}
