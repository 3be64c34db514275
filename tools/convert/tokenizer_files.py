"""Tokenizer and generation files of an exported model, with which transformers generates text.

In: a checkpoint's manifest and folder, an optional tokenizer. Out: files in a folder, and the ids of special tokens.

Torch-free.
"""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from configs import schema
from configs.errors import ConfigError, Problem
from pretrain.checkpoint.manifest import Manifest
from pretrain.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, section_for
from pretrain.run.files import write_json
from tools.data import embedded_corpus
from tools.data.tokenizer_json import equal_tokenizer

COMPANIONS = "huggingface"
KEPT = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "special_tokens_map.json", "merges.txt", "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
SENTENCEPIECE_CLASS, SENTENCEPIECE_FILE = "BertGenerationTokenizer", "spiece.model"
"""The class of transformers 4 and 5 that runs sentencepiece itself and adds no token to a text, and the file it reads."""
WITHOUT_SLOW_TOKENIZER = ("glm4_moe", "mixtral", "mistral")
"""Values of model_type for which AutoTokenizer of transformers 5 ignores tokenizer_class."""
NUM_SAMPLES, SAMPLE_BYTES = 60, 4000


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


def write_tokenizer(folder: Path, checkpoint: Path, tokenizer: Tokenizer | None, model_type: str) -> list[str]:
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
        # The file may have another name, and stand beside the tokenizer.json of another tokenizer.
        shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
        return _write_rest(folder, tokenizer)
    return _write_sentencepiece(folder, tokenizer, model_type)


def _write_sentencepiece(folder: Path, tokenizer: SentencePieceTokenizer, model_type: str) -> list[str]:
    """tokenizer.json and tokenizer.model when a tokenizer.json can be equal, else a file for a class that runs sentencepiece."""
    converted, reason = equal_tokenizer(tokenizer.proto, _sample_texts())
    if converted is not None:
        converted.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer.model").write_bytes(tokenizer.proto)
        return _write_rest(folder, tokenizer)
    # AutoTokenizer would make another tokenizer of a tokenizer.model, with other ids and without a warning.
    (folder / SENTENCEPIECE_FILE).write_bytes(tokenizer.proto)
    processor = tokenizer.processor
    pad, bos = processor.pad_id(), processor.bos_id()
    # Absent keys would add tokens of the class itself after the vocabulary. A named unk_token would be parsed in texts.
    config = {
        "tokenizer_class": SENTENCEPIECE_CLASS,
        "eos_token": tokenizer.token(tokenizer.eod_id),
        "unk_token": None,
        "bos_token": tokenizer.token(bos) if bos >= 0 else None,
        "pad_token": tokenizer.token(pad) if pad >= 0 else None,
        "sep_token": None,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    loader = f"AutoTokenizer loads {SENTENCEPIECE_CLASS}"
    if model_type in WITHOUT_SLOW_TOKENIZER:
        loader = (
            f"AutoTokenizer of transformers 5 refuses it for model_type {model_type}: load it with "
            f"transformers.{SENTENCEPIECE_CLASS}.from_pretrained(HF_DIR)"
        )
    note = (
        f"no tokenizer.json can be equal to this sentencepiece model ({reason}); {SENTENCEPIECE_FILE} was written instead. "
        f"{loader}, which gives equal ids; transformers 5 decodes only approximately, sentencepiece itself exactly"
    )
    return [note, *_write_rest(folder, tokenizer)]


def _sample_texts() -> list[str]:
    """Parts of the embedded corpus, on which a tokenizer.json is compared with its sentencepiece model."""
    return [text[:SAMPLE_BYTES].decode(errors="ignore") for _, text in islice(embedded_corpus.documents(), NUM_SAMPLES)]


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
