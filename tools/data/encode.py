"""Documents to token bytes, as fast as the tokenizer allows and exactly as it encodes each document whole.

In: texts. Out: for each the bytes of its ids in the dtype of the .bin. Memory: one document, and a bounded cache.

Sentencepiece BPE costs 0.2 µs a byte. When no piece reaches over the beginning of a word, merges cannot either, so a
document's ids are its words' ids in a row, and words repeat: they are looked up. `words_are_independent` says when.

Torch-free.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable

import numpy as np

from pretrain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

WORD = re.compile(r" *[^ ]+| +")
CACHED_WORDS = 1 << 18
LONGEST_CACHED = 64
"""Words of up to this many characters are kept; at some 150 bytes each the full cache takes about 40 MB."""
SPACE = "▁"
BPE, NORMAL, USER_DEFINED, UNUSED = 2, 1, 4, 5
"""Numbers of sentencepiece_model.proto."""


def words_are_independent(proto: bytes) -> bool:
    """Whether a sentencepiece model encodes a text as the words ` *[^ ]+` one after another, for certain.

    BPE only (a unigram's sums are rounded along the whole text), texts taken as they are, unknown characters as bytes,
    and no piece with a space behind another character.
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
    """Word → bytes of its ids. Emptied when full: cheaper than any order of use, and natural text refills it at once."""

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


class Encoder:
    """`encode(texts)`: the bytes of each document's ids, with the end-of-document id behind it when asked."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.typecode = dtype.char  # array's letters are numpy's; array turns a short list into bytes three times as fast
        self.end = array(self.typecode, [tokenizer.eod_id]).tobytes() if append_eod else b""
        self.words: _WordCache | None = None
        if isinstance(tokenizer, SentencePieceTokenizer) and words_are_independent(tokenizer.proto):
            self.words = _WordCache(self._whole)

    def encode(self, texts: list[str]) -> list[bytes]:
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            batch = self.tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [array(self.typecode, item.ids).tobytes() + self.end for item in batch]
        return [self._document(text) + self.end for text in texts]

    def _document(self, text: str) -> bytes:
        if self.words is None or SPACE in text:  # a literal ▁ is a space to sentencepiece, not to WORD
            return self._whole(text)
        return b"".join(map(self.words.__getitem__, WORD.findall(text)))

    def _whole(self, text: str) -> bytes:
        return array(self.typecode, self.tokenizer.encode(text)).tobytes()
