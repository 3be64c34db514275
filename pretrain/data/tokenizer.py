"""Text to token ids and back, with sentencepiece's .model and Hugging Face's tokenizer.json.

In: the `data.tokenizer` section. Out: a `TextTokenizer` with vocab_size, eod_id, encode, decode and identity. The name of a
special token in a text is plain characters to sentencepiece. A tokenizer.json may parse it as the special token.

Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import sentencepiece

from configs import schema
from configs.errors import ConfigError, Problem
from pretrain.data.indexed import file_problem

KEY = "data.tokenizer"
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eod>", "<|eod|>", "<eos>", "</s>", "[EOS]", "<|eos|>")
"""Names of end-of-document tokens, searched in this order. The last candidate is the tokenizer's own eos token."""


class TextTokenizer(ABC):
    """A loaded tokenizer. `vocab_size`: the largest id + 1. `eod_id`: the id of the token that ends every document."""

    kind: str
    path: str
    sha256: str
    vocab_size: int
    eod_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of the text. No special token is added before or after it."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of the ids, without special tokens."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """The tokenizer's name of one id, for display."""

    @abstractmethod
    def find(self, name: str) -> int | None:
        """The id of the token with this name. None: there is none."""

    def identity(self) -> dict[str, Any]:
        """The values that must be equal in data, run and checkpoint."""
        return {"kind": self.kind, "sha256": self.sha256, "vocab_size": self.vocab_size}


class SentencePieceTokenizer(TextTokenizer):
    """A sentencepiece .model. Raises ConfigError if `proto` is not a valid model, or lacks the end-of-document token."""

    kind = "sentencepiece"

    def __init__(self, path: str, proto: bytes, eod: str | None) -> None:
        self.path, self.proto, self.sha256 = path, proto, hashlib.sha256(proto).hexdigest()
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(proto)
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(_unreadable(path, "a sentencepiece .model", error)) from error
        self.vocab_size = self.processor.vocab_size()
        if not self.vocab_size:
            raise ConfigError(_unreadable(path, "a sentencepiece .model", "no pieces"))
        own = [self.processor.id_to_piece(self.processor.eos_id())] if self.processor.eos_id() >= 0 else []
        names = [eod] if eod else [*EOD_NAMES, *own]
        self.eod_id = _find_eod(path, names, self.find)

    def find(self, name: str) -> int | None:
        number = self.processor.piece_to_id(name)
        return number if self.processor.id_to_piece(number) == name else None

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def token(self, token_id: int) -> str:
        return self.processor.id_to_piece(token_id)


class HuggingFaceTokenizer(TextTokenizer):
    """A tokenizer.json. Raises ConfigError if `raw` is not a valid tokenizer, or lacks the end-of-document token."""

    kind = "huggingface"

    def __init__(self, path: str, raw: bytes, eod: str | None) -> None:
        from tokenizers import Tokenizer as Backend  # noqa: PLC0415  (30 ms that sentencepiece users need not pay)

        self.path, self.sha256 = path, hashlib.sha256(raw).hexdigest()
        try:
            self.backend = Backend.from_str(raw.decode("utf-8"))
        except Exception as error:  # the Rust side raises a bare Exception
            raise ConfigError(_unreadable(path, "a Hugging Face tokenizer.json", error)) from error
        self.backend.no_padding()
        self.backend.no_truncation()
        vocab = self.backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ConfigError(_unreadable(path, "a Hugging Face tokenizer.json", "no tokens"))
        self.vocab_size = max(vocab.values()) + 1
        names = [eod] if eod else [*EOD_NAMES, *_configured_eos(path)]
        self.eod_id = _find_eod(path, names, vocab.get)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def find(self, name: str) -> int | None:
        return self.backend.token_to_id(name)

    def decode(self, ids: list[int]) -> str:
        special = self.eod_id
        return self.backend.decode([i for i in ids if i != special], skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        return self.backend.id_to_token(token_id) or ""


def load_tokenizer(section: schema.TokenizerConfig, key: str = KEY) -> TextTokenizer:
    """The tokenizer of the section.

    Raises ConfigError when the section has no path, the file can't be read or has another format, or the tokenizer has no
    end-of-document token.
    """
    if not section.path:
        fix = f"set {key}.path, or make a tokenizer: phalanx data tokenizer --corpus SRC --out PATH.model"
        raise ConfigError(Problem(f"{key}.path", section.path, "a run needs a tokenizer", fix))
    try:
        raw = Path(section.path).read_bytes()
    except OSError as error:
        raise ConfigError(file_problem(error, section.path, f"{key}.path")) from error
    looks_json = raw[:1] == b"{"
    if looks_json != (section.kind == "huggingface"):
        other = "huggingface" if looks_json else "sentencepiece"
        rule = f"the file must be of the kind {section.kind}, it {'is' if looks_json else 'is not'} JSON"
        raise ConfigError(Problem(f"{key}.kind", section.kind, rule, f"set {key}.kind={other}, or name another file"))
    kind = HuggingFaceTokenizer if section.kind == "huggingface" else SentencePieceTokenizer
    return kind(section.path, raw, section.eod)


def section_for(path: str) -> schema.TokenizerConfig:
    """The section for a file named on the command line. A .json file is Hugging Face's, any other file sentencepiece's."""
    return schema.TokenizerConfig(kind="huggingface" if str(path).endswith(".json") else "sentencepiece", path=str(path))


def _unreadable(path: str, what: str, error: object) -> Problem:
    fix = "name another file, or set data.tokenizer.kind to what it is"
    return Problem(f"{KEY}.path", path, f"the file must be {what}: {str(error)[:200]}", fix)


def _find_eod(path: str, names: list[str], find: Any) -> int:
    for name in names:
        number = find(name)
        if number is not None:
            return int(number)
    rule = "the tokenizer must have an end-of-document token; none of these is in it: " + " ".join(names)
    raise ConfigError(Problem(f"{KEY}.eod", path, rule, f"set {KEY}.eod to the text of the token that ends a document"))


def _configured_eos(path: str) -> list[str]:
    """The eos_token of the tokenizer_config.json beside a tokenizer.json, as a list of one name or none."""
    beside = Path(path).with_name("tokenizer_config.json")
    if not beside.is_file():
        return []
    try:
        eos = json.loads(beside.read_text("utf-8")).get("eos_token")
    except (ValueError, AttributeError, OSError) as error:
        raise ConfigError(_unreadable(str(beside), "a JSON mapping", error)) from error
    text = eos.get("content") if isinstance(eos, dict) else eos
    return [text] if isinstance(text, str) else []


def vocab_size(config: schema.Config, tokenizer: TextTokenizer | None = None) -> int:
    """Tokens of the vocabulary before padding: model.vocab_size, or the tokenizer's.

    Raises ConfigError when neither is known.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    return (tokenizer or load_tokenizer(config.data.tokenizer)).vocab_size
