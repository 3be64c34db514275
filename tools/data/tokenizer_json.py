"""A sentencepiece model as Hugging Face's tokenizer.json.

In: the model. Out: a `tokenizers.Tokenizer`, or the reason why there is none. Only models that don't normalize text are
exported. Equal ids are never assumed: `difference` compares both on samples. No token is declared special, so that a text with
the characters <|endoftext|> is encoded as these characters, as sentencepiece does.

Torch-free.
"""

from __future__ import annotations

from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers

UNIGRAM, BPE = 1, 2
NORMAL = 1
UNREACHABLE = -1e6
"""Score of pieces that no text may become. Hugging Face's unigram would match <unk> and <0x0A> in a text that spells them."""


def to_huggingface(proto: bytes) -> tuple[Tokenizer | None, str | None]:
    """(tokenizer, None), or (None, why the model can't be exported)."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(proto)
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        return None, "the model changes the text before encoding it"
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        return None, "only bpe and unigram models have a counterpart"
    core = _bpe(model) if model.trainer_spec.model_type == BPE else _unigram(model)
    tokenizer = Tokenizer(core)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer, None


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


def difference(original: sentencepiece.SentencePieceProcessor, exported: Tokenizer, samples: list[str]) -> str | None:
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
