"""Text to token ids and back: sentencepiece .model and Hugging Face tokenizer.json. No torch.

In: the `data.tokenizer` section. Out: a `Tokenizer` with vocab_size, eod_id, encode, decode and identity.
Special tokens in a text are ordinary characters for sentencepiece; a tokenizer.json may parse them.

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
"""Names under which an end-of-document token is looked for, in this order; then what the tokenizer itself calls eos."""


class Tokenizer(ABC):
    """A loaded tokenizer. `vocab_size` counts ids from 0 to the largest one; `eod_id` ends every document."""

    kind: str
    path: str
    sha256: str
    vocab_size: int
    eod_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is put before or behind it."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """How the tokenizer writes one id, for people."""

    def identity(self) -> dict[str, Any]:
        """What must agree between data, run and checkpoint."""
        return {"kind": self.kind, "sha256": self.sha256, "vocab_size": self.vocab_size}


class SentencePieceTokenizer(Tokenizer):
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
        self.eod_id = _find_eod(path, names, self._id)

    def _id(self, name: str) -> int | None:
        number = self.processor.piece_to_id(name)
        return number if self.processor.id_to_piece(number) == name else None

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def token(self, token_id: int) -> str:
        return self.processor.id_to_piece(token_id)


class HuggingFaceTokenizer(Tokenizer):
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

    def decode(self, ids: list[int]) -> str:
        special = self.eod_id
        return self.backend.decode([i for i in ids if i != special], skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        return self.backend.id_to_token(token_id) or ""


def load_tokenizer(section: schema.Tokenizer, key: str = KEY) -> Tokenizer:
    """The tokenizer of the section. Raises ConfigError: no path, no file, another format, no end-of-document token."""
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


def section_for(path: str) -> schema.Tokenizer:
    """The section for a file named on the command line: .json is Hugging Face's, anything else sentencepiece's."""
    return schema.Tokenizer(kind="huggingface" if str(path).endswith(".json") else "sentencepiece", path=str(path))


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
    """eos_token of the tokenizer_config.json beside a tokenizer.json, when there is one."""
    beside = Path(path).with_name("tokenizer_config.json")
    if not beside.is_file():
        return []
    try:
        eos = json.loads(beside.read_text("utf-8")).get("eos_token")
    except (ValueError, AttributeError, OSError) as error:
        raise ConfigError(_unreadable(str(beside), "a JSON mapping", error)) from error
    text = eos.get("content") if isinstance(eos, dict) else eos
    return [text] if isinstance(text, str) else []


def vocab_size(config: schema.Config, tokenizer: Tokenizer | None = None) -> int:
    """Tokens of the vocabulary, before padding: model.vocab_size, or the tokenizer's. Raises ConfigError without either."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    return (tokenizer or load_tokenizer(config.data.tokenizer)).vocab_size
