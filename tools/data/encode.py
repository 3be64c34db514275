"""Documents -> token bytes, as fast as the tokenizer allows, with exactly the ids of the whole document.

In: texts. Out: for each text the bytes of its ids in the dtype of the .bin. Memory: one document, what the tokenizer takes for a
piece of it (tools/data/cut_text.py), and a bounded cache.

Sentencepiece BPE costs 0.2 µs per byte. When no piece crosses the beginning of a word, no merge does either. The ids of a
document are then the ids of its words, which repeat and can be looked up. `words_are_independent` tells when.

Torch-free.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable

import numpy as np

from configs.errors import ConfigError, Problem
from pretrain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, TextTokenizer
from tools.data.cut_text import Cutter, cutter

PIECE_CHARS = 1 << 18
"""Longer documents are cut into such pieces. Sentencepiece's BPE takes 46 bytes a character, a tokenizer.json 137 (measured)."""
WORD = re.compile(r" *[^ ]+| +")
CACHED_WORDS = 1 << 18
LONGEST_CACHED = 64
"""Longest cached word in characters. At some 150 bytes per word the full cache takes about 40 MB."""
SPACE = "▁"
BPE, NORMAL, USER_DEFINED, UNUSED = 2, 1, 4, 5
"""Numbers of sentencepiece_model.proto."""


def words_are_independent(proto: bytes) -> bool:
    """Whether a sentencepiece model is certain to encode a text as its words ` *[^ ]+`, one after another.

    True only for BPE (unigram scores are rounded along the whole text) without normalization, with byte fallback, and without
    a piece that has a space after another character.
    """
    from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415  (protobuf: 40 ms, for this question only)

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(proto)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    as_is = (
        not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and not normalizer.precompiled_charsmap
        and not trainer.treat_whitespace_as_suffix
    )
    texts = [piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)]
    crossing = re.compile(f"[^{SPACE}]{SPACE}")
    return (
        trainer.model_type == BPE
        and as_is
        and trainer.byte_fallback
        and SPACE in texts
        and not any(crossing.search(text) for text in texts)
    )


class _WordCache(dict[str, bytes]):
    """Word -> bytes of its ids. A full cache is emptied: that is cheaper than tracking use, and text refills it at once."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = self.encode(word)
        if len(word) <= LONGEST_CACHED:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def read_special_tokens_as_text(tokenizer: TextTokenizer) -> None:
    """Make the names of special tokens, and of the end-of-document token, plain characters. Raises ConfigError if it can't be."""
    eod = tokenizer.token(tokenizer.eod_id)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        spec = json.loads(tokenizer.backend.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["special"] or token["content"] == eod
        tokenizer.backend = type(tokenizer.backend).from_str(json.dumps(spec))
        tokenizer.backend.encode_special_tokens = True
    if tokenizer.eod_id in tokenizer.encode(eod):
        rule = f"this tokenizer has no way to read {eod} as plain text: it is a piece of its vocabulary like any other"
        raise ConfigError(Problem("--special-tokens", "text", rule, "leave the option out, or take it out of the text"))


def special_tokens(tokenizer: TextTokenizer) -> dict[int, str]:
    """Id -> name of the special tokens that a text may spell."""
    found = {tokenizer.eod_id: tokenizer.token(tokenizer.eod_id)}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found |= {
            number: token.content for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special
        }
    return found


class Encoder:
    """`encode(texts)`: the bytes of each document's ids, followed by the end-of-document id when that is wanted.

    `whole_chars`: the length of the longest document that was longer than a piece, yet had to be encoded whole; `whole_reason`.
    """

    def __init__(self, tokenizer: TextTokenizer, dtype: np.dtype, append_eod: bool, piece_chars: int = PIECE_CHARS) -> None:
        self.tokenizer = tokenizer
        self.typecode = dtype.char  # same letters as numpy's; array makes bytes of a short list three times as fast
        self.end = array(self.typecode, [tokenizer.eod_id]).tobytes() if append_eod else b""
        self.piece_chars = piece_chars
        self.whole_chars, self.whole_reason = 0, ""
        self._cutter: Cutter | str | None = None
        self.words: _WordCache | None = None
        if isinstance(tokenizer, SentencePieceTokenizer) and words_are_independent(tokenizer.proto):
            self.words = _WordCache(self._whole)

    def encode(self, texts: list[str]) -> list[bytes]:
        if isinstance(self.tokenizer, HuggingFaceTokenizer) and all(len(text) <= self.piece_chars for text in texts):
            batch = self.tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [array(self.typecode, item.ids).tobytes() + self.end for item in batch]
        return [self._document(text) + self.end for text in texts]

    def _document(self, text: str) -> bytes:
        if len(text) > self.piece_chars:
            return self._long(text)
        if self.words is None or SPACE in text:  # sentencepiece reads a literal ▁ as a space, WORD doesn't
            return self._whole(text)
        return b"".join(map(self.words.__getitem__, WORD.findall(text)))

    def _long(self, text: str) -> bytes:
        """A long text in pieces, or whole."""
        if self._cutter is None:
            self._cutter = cutter(self.tokenizer)
        if isinstance(self._cutter, str):
            if len(text) > self.whole_chars:
                self.whole_chars, self.whole_reason = len(text), self._cutter
            return self._whole(text)
        return b"".join(array(self.typecode, ids).tobytes() for ids in self._cutter.pieces(text, self.piece_chars))

    def _whole(self, text: str) -> bytes:
        return array(self.typecode, self.tokenizer.encode(text)).tobytes()
