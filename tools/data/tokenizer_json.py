"""A sentencepiece model as Hugging Face's tokenizer.json.

In: the model. Out: a `tokenizers.Tokenizer` with equal ids and decoded texts, or the reason why there is none. Equality is
never assumed: each candidate is compared with sentencepiece on texts on which tokenizers tend to differ. No control token is
declared special, so that a text with the characters <|endoftext|> is encoded as these characters, as sentencepiece does.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

UNIGRAM, BPE = 1, 2
NORMAL, USER_DEFINED = 1, 4
"""Numbers of sentencepiece_model.proto."""
SPACE = "▁"
UNREACHABLE = -1e6
"""Score of pieces that no text may become. Hugging Face's unigram would match <unk> and <0x0A> in a text that spells them."""
WORDS = (
    "", " ", "  ", "\n", "\t x", " a", "a ", "  a  b   c\r\n", "x\u00a0y\u3000z", "naïve café ﬁ ① ½ Ⅷ ﾊﾟ ｶﾞ", "e\u0301\u0327",
    "\0\u200b\ufeff", "▁ ▁▁", "▁a", "<unk> <0x0A>", "<s></s>", "🎉👩‍👩‍👧 日本語", "한국어 العربية", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ẞ ǆ",
    "\U000e0041\uffff a\u2028b",
    "1234567890 3.14 0x1F", "don't WON'T 'tis", "http://a.b/c?d=e&f#g", "def f(x):\n\treturn x  # 1\n\n\n",
)  # fmt: skip
"""Texts on which tokenizers differ: white space, characters that normalization changes, special tokens, unusual scripts."""
RUN_LENGTHS = (1, 2, 3, 5, 8, 13, 33, 100)
PIECES_TRIED = 4000
"""Vocabulary pieces that are compared as texts, evenly spaced over the vocabulary."""


def equal_tokenizer(proto: bytes, texts: Sequence[str] = ()) -> tuple[Tokenizer | None, str | None]:
    """(tokenizer, None): it agrees with the sentencepiece model on `texts` and on hard samples; or (None, the reason)."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(proto)
    if reason := _without_counterpart(model):
        return None, reason
    original = sentencepiece.SentencePieceProcessor(model_proto=proto)
    samples = [*hard_samples(model), *texts]
    reason = None
    for candidate in _candidates(model):
        found = difference(original, candidate, samples)
        if found is None:
            return candidate, None
        reason = reason or found
    return None, reason


def _without_counterpart(model: Any) -> str | None:
    """Why tokenizers has no model of this kind."""
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        return "only bpe and unigram models have a counterpart"
    if model.trainer_spec.treat_whitespace_as_suffix:
        return "white space as a suffix has no counterpart"
    if not model.normalizer_spec.escape_whitespaces:
        return "white space that is not escaped has no counterpart"
    return None


def hard_samples(model: Any) -> list[str]:
    """Texts on which tokenizers tend to differ: WORDS, runs of one character, pieces of the vocabulary, its own symbols."""
    runs = [char * count for char in " \n-=*a#" for count in RUN_LENGTHS]
    pieces = [piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)]
    spaced = pieces[:: max(1, len(pieces) // PIECES_TRIED)]
    as_texts = [piece.replace(SPACE, " ") for piece in spaced]
    joined = ["".join(as_texts[at : at + 7]) for at in range(0, len(as_texts), 7)]
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    around = [
        text for symbol in symbols[:64] for text in (symbol, f"{symbol}a", f"a{symbol}b", f"a {symbol} b", f" {symbol}{symbol} ")
    ]
    return [*WORDS, *runs, *as_texts, *joined, *around]


def _candidates(model: Any) -> Iterator[Tokenizer]:
    """Tokenizers that may be equal to the model. They differ in where a dummy prefix is put."""
    normalizer = model.normalizer_spec
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    escape = normalizers.Replace(" ", SPACE)
    prepend = [normalizers.Prepend(SPACE)] if normalizer.add_dummy_prefix else []
    yield _assembled(model, [*steps, *prepend, escape], None, symbols)
    if normalizer.add_dummy_prefix:
        # Prepend acts on every part between two user-defined symbols, Metaspace only on the first part of a text.
        first = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        yield _assembled(model, steps, first, symbols)


def _assembled(model: Any, steps: list[Any], pre_tokenizer: Any, symbols: list[str]) -> Tokenizer:
    core = _bpe(model) if model.trainer_spec.model_type == BPE else _unigram(model)
    tokenizer: Any = Tokenizer(core)
    tokenizer.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    decoding: list[Any] = [decoders.Replace(SPACE, " ")]
    if model.trainer_spec.byte_fallback:
        decoding.append(decoders.ByteFallback())
    else:
        # sentencepiece decodes an unknown character as " ⁇ ".
        decoding.append(decoders.Replace(model.trainer_spec.unk_piece, model.trainer_spec.unk_surface))
    decoding.append(decoders.Fuse())
    if model.normalizer_spec.add_dummy_prefix or model.normalizer_spec.remove_extra_whitespaces:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    if symbols:
        tokenizer.add_tokens([AddedToken(symbol, normalized=False, special=False) for symbol in symbols])
    return tokenizer


def _bpe(model: Any) -> models.Model:
    """A merge for every way to make a piece of two others. Pieces with better scores merge first."""
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocab[left], vocab[right], (left, right)))
    pairs = [pair for *_, pair in sorted(merges)]
    unknown = model.trainer_spec.unk_piece
    return models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=model.trainer_spec.byte_fallback)


def _unigram(model: Any) -> models.Model:
    scored = [(piece.piece, piece.score if piece.type == NORMAL else UNREACHABLE) for piece in model.pieces]
    return models.Unigram(scored, unk_id=model.trainer_spec.unk_id, byte_fallback=model.trainer_spec.byte_fallback)


def difference(original: sentencepiece.SentencePieceProcessor, exported: Tokenizer, samples: Sequence[str]) -> str | None:
    """The first sample that the two tokenizers encode or decode differently, as a sentence; None without one."""
    for text in samples:
        ids = original.encode(text)
        other = exported.encode(text, add_special_tokens=False).ids
        if ids != other:
            at = next((k for k, pair in enumerate(zip(ids, other)) if pair[0] != pair[1]), min(len(ids), len(other)))
            return f"ids differ from token {at} on in {text[:60]!r}: {ids[at : at + 5]} and {other[at : at + 5]}"
        if original.decode(ids) != exported.decode(other, skip_special_tokens=False):
            return f"decoded texts differ for {text[:60]!r}"
    return None
