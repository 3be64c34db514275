"""Tokenizer and generation files of an exported model, with which transformers generates text.

In: a checkpoint's manifest and folder, an optional tokenizer. Out: files in a folder, and the ids of special tokens.

Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from configs import schema
from configs.errors import ConfigError, Problem
from pretrain.checkpoint.manifest import Manifest
from pretrain.data.tokenizer import SentencePieceTokenizer, TextTokenizer, load_tokenizer, section_for
from pretrain.run.files import write_json
from tools.data.read import embedded_corpus
from tools.data.tokenizer_json import equal_tokenizer

COMPANIONS = "huggingface"
GENERATION = "generation_config.json"
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model", "tekken.json", "spiece.model", "sentencepiece*.model",
    "spm*.model", "vocab.json", "vocab.txt",
)  # fmt: skip
"""Names of files that hold a vocabulary. A folder without any of them has no tokenizer."""
KEPT = (
    GENERATION, *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "merges.txt", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", "tokenization_*.py",
)  # fmt: skip
"""Names of files that belong to a tokenizer or to generation. They are copied as they are; code among them is never run."""
_BESIDE = (
    GENERATION, "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
"""Names of files that belong to a tokenizer.json in the same folder, which may be a folder of data."""
_LEFT_OUT = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.md", "LICENSE*", "NOTICE*", "*.png", "*.jpg", "*.pdf")
"""Names of files that need no note when they are not carried over."""
_SHOWN = 8
SENTENCEPIECE_CLASS, SENTENCEPIECE_FILE = "BertGenerationTokenizer", "spiece.model"
"""The class of transformers 4 and 5 that runs sentencepiece itself and adds no token to a text, and the file it reads."""
WITHOUT_SLOW_TOKENIZER = ("glm4_moe", "mixtral", "mistral")
"""Values of model_type for which AutoTokenizer of transformers 5 ignores tokenizer_class."""
NUM_SAMPLES, SAMPLE_BYTES = 60, 4000


def companion_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of its tokenizer and generation files, with the Python modules that these import."""
    found = {path.relative_to(folder) for pattern in KEPT for path in folder.glob(pattern) if path.is_file()}
    waiting = [path for path in found if path.suffix == ".py"]
    while waiting:
        text = (folder / waiting.pop()).read_text(encoding="utf-8", errors="replace")
        for name in re.findall(r"^\s*from\s+\.(\w+)\s+import", text, re.MULTILINE):
            module = Path(f"{name}.py")
            if module not in found and (folder / module).is_file():
                found.add(module)
                waiting.append(module)
    return sorted(found)


def left_out_note(folder: Path) -> list[str]:
    """A note that names the files of a Hugging Face folder that an import does not carry over."""
    kept = {path.parts[0] for path in companion_files(folder)}
    others = [path for path in sorted(folder.iterdir()) if path.name not in kept and not path.name.startswith(".")]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in others if not any(map(path.match, _LEFT_OUT))]
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"not carried over: {', '.join(names[:_SHOWN])}{more}; code of the folder is never run"]


def copy_files(source: Path, names: Iterable[Path], target: Path) -> None:
    """Copy files of `source` to the same relative places in `target`."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def find_tokenizer(manifest: Manifest, folder: Path, named: str | None) -> TextTokenizer | None:
    """The tokenizer that is named, else the run's, else the one that was imported with the model; None without any of them.

    Raises ConfigError.
    """
    if named:
        tokenizer = load_tokenizer(section_for(named), "--tokenizer")
        _same(tokenizer, manifest, named)
        return tokenizer
    section = manifest.config.get("data", {}).get("tokenizer", {})
    if section.get("path") and Path(section["path"]).is_file():
        kind, path, eod = section.get("kind", "sentencepiece"), section["path"], section.get("eod")
        tokenizer = load_tokenizer(schema.TokenizerConfig(kind, path, eod))
        _same(tokenizer, manifest, section["path"])
        return tokenizer
    for name in ("tokenizer.json", "tokenizer.model", SENTENCEPIECE_FILE):
        own = folder / COMPANIONS / name
        if own.is_file():
            try:
                return load_tokenizer(section_for(str(own)))
            except ConfigError:
                # A tokenizer without an end-of-document token, or of another format, can't be used here. Its files are copied.
                continue
    return None


def _same(tokenizer: TextTokenizer, manifest: Manifest, path: str) -> None:
    wanted = (manifest.tokenizer or {}).get("sha256")
    if wanted and wanted != tokenizer.sha256:
        rule = f"must be the tokenizer of the checkpoint (sha256 {wanted[:12]}…)"
        raise ConfigError(Problem("--tokenizer", path, rule, "name that file: --tokenizer PATH"))
    if tokenizer.vocab_size > manifest.vocab_size:
        rule = f"must have at most the {manifest.vocab_size} tokens of the model"
        raise ConfigError(Problem("--tokenizer", tokenizer.vocab_size, rule, "name the tokenizer that it was trained with"))


def write_tokenizer(
    folder: Path, checkpoint: Path, tokenizer: TextTokenizer | None, model_type: str, is_named: bool = False
) -> list[str]:
    """Write the tokenizer's files into `folder`. Returns notes.

    The files that came with an import are copied, unless another tokenizer `is_named` by the user.
    """
    companions = checkpoint / COMPANIONS
    names = companion_files(companions) if companions.is_dir() else []
    has_own = any(name.match(pattern) for name in names for pattern in VOCABULARIES)
    if has_own and not (is_named and tokenizer and not _is_among(tokenizer, companions)):
        copy_files(companions, names, folder)
        return []
    copy_files(companions, [name for name in names if name.name == GENERATION], folder)
    if tokenizer is None:
        return ["no tokenizer was found: add its files, or name it with --tokenizer PATH"]
    notes = [f"the tokenizer that came with the import was left out: --tokenizer names {tokenizer.path}"] if has_own else []
    return [*notes, *_write_loaded(folder, tokenizer, model_type)]


def _is_among(tokenizer: TextTokenizer, companions: Path) -> bool:
    """Whether the tokenizer's own file came with the import."""
    candidates = [companions / name for name in ("tokenizer.json", "tokenizer.model", SENTENCEPIECE_FILE)]
    return any(hashlib.sha256(path.read_bytes()).hexdigest() == tokenizer.sha256 for path in candidates if path.is_file())


def _write_loaded(folder: Path, tokenizer: TextTokenizer, model_type: str) -> list[str]:
    """The files of a tokenizer that is loaded. Returns notes."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        place = Path(tokenizer.path).parent
        copy_files(place, [Path(name) for name in _BESIDE if (place / name).is_file()], folder)
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


def _write_rest(folder: Path, tokenizer: TextTokenizer) -> list[str]:
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


def special_ids(checkpoint: Path, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """bos, eos and pad ids for config.json: those of the import, else the end-of-document token.

    Absent ids are null: transformers would replace a missing key by its default.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = checkpoint / COMPANIONS / "config.json"
    if own.is_file():
        config = json.loads(own.read_bytes())
        return {name: config[name] for name in names if name in config}
    return {"bos_token_id": None, "eos_token_id": tokenizer.eod_id if tokenizer else None, "pad_token_id": None}
