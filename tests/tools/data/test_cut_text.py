"""Long documents are encoded in pieces with the ids of the whole text, for every kind of tokenizer that has a cutter."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pretrain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, TextTokenizer
from tools.data.cut_text import Cutter, cutter
from tools.data.encode import Encoder
from tools.data.read.embedded_corpus import documents
from tools.data.tokenizer_json import equal_tokenizer
from tools.data.train_tokenizer import _round_scores

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA_3.replace("{1,3}", "")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
PARTS = (
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "a", "the", "of the", "I'll", "don'T", "x", "Z", "12", "1234567", ".", ",", ", ",
    ".\n", "!?", "é", "e\u0301", "\u0327", "日本", "日本，中文。", "中文\n中", "ﬁ", "½", "▁", "▁▁a", "🎉👩\u200d👧", "\0",
    "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "ｱﾞ", "<|endoftext|>", "<s>", "<0x0A>", "ẞ", "//", "/\n", "=====", "------",
    "def f(x):\n\treturn x", "한국어", "𝔘",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS), min_size=2, max_size=40).map("".join)


@cache
def corpus() -> list[str]:
    plain = [text.decode()[:3000] for _, text in documents()][:60]
    return [*plain, "日本，中文。中文日本 " * 20, "I'll don't 한국어 é e\u0301 " * 10]


def trained(**options: Any) -> SentencePieceTokenizer:
    model = io.BytesIO()
    common = {"vocab_size": 700, "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    common |= {"add_dummy_prefix": False, "eos_piece": "<|endoftext|>", "minloglevel": 2, "hard_vocab_limit": False}
    sentences = (line for text in corpus() for line in text.splitlines(keepends=True))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **{**common, **options})
    return SentencePieceTokenizer("t.model", model.getvalue(), "<|endoftext|>")


def rounded(tokenizer: SentencePieceTokenizer) -> SentencePieceTokenizer:
    return SentencePieceTokenizer("t.model", _round_scores(tokenizer.proto), "<|endoftext|>")


def exported(tokenizer: SentencePieceTokenizer) -> HuggingFaceTokenizer:
    backend, reason = equal_tokenizer(tokenizer.proto)
    assert backend is not None, reason
    return loaded(backend)


def loaded(backend: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer("tokenizer.json", backend.to_str().encode(), "<|endoftext|>")


def splitting(*steps: Any, normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> HuggingFaceTokenizer:
    """A BPE tokenizer of words."""
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special: list[Any] = ["<|endoftext|>", *added]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    return loaded(backend)


def pattern(*patterns: str, **options: Any) -> HuggingFaceTokenizer:
    splits = [pre_tokenizers.Split(Regex(text), "isolated") for text in patterns]
    return splitting(*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), **options)


def words_of_bert() -> HuggingFaceTokenizer:
    backend: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "<|endoftext|>", AddedToken("<mask>", lstrip=True)]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    return loaded(backend)


def metaspace(split: bool, scheme: Any) -> HuggingFaceTokenizer:
    """Our BPE export, with Metaspace in the place of its normalizer."""
    backend: Any = exported(trained(model_type="bpe")).backend
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)
    backend.decoder = decoders.Metaspace()
    return loaded(backend)


KINDS = {
    "bpe": lambda: trained(model_type="bpe"),
    "bpe, line breaks in pieces": lambda: trained(model_type="bpe", split_by_unicode_script=False, split_digits=True),
    "bpe over words": lambda: trained(model_type="bpe", split_by_whitespace=False),
    "bpe as llama": lambda: trained(model_type="bpe", add_dummy_prefix=True),
    "bpe with symbols": lambda: trained(model_type="bpe", user_defined_symbols=["of the", "x▁", "  ", "中文\n"]),
    "bpe without bytes": lambda: trained(model_type="bpe", byte_fallback=False),
    "unigram, exact": lambda: rounded(trained(model_type="unigram")),
    "unigram as llama, exact": lambda: rounded(trained(model_type="unigram", add_dummy_prefix=True)),
    "unigram without bytes, exact": lambda: rounded(trained(model_type="unigram", byte_fallback=False)),
    "json: bpe": lambda: exported(trained(model_type="bpe")),
    "json: bpe as llama": lambda: exported(trained(model_type="bpe", add_dummy_prefix=True)),
    "json: unigram, exact": lambda: exported(rounded(trained(model_type="unigram"))),
    "json: metaspace of words": lambda: metaspace(True, "always"),
    "json: metaspace of texts": lambda: metaspace(False, "first"),
    "json: gpt 2": lambda: splitting(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "json: gpt 2 with a prefix": lambda: splitting(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "json: starcoder": lambda: splitting(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "json: llama 3": lambda: pattern(LLAMA_3),
    "json: qwen": lambda: pattern(QWEN, normalizer=normalizers.NFC()),
    "json: gpt 4o": lambda: pattern(GPT_4O),
    "json: deepseek": lambda: pattern(*DEEPSEEK),
    "json: bert": words_of_bert,
    "json: white space": lambda: splitting(pre_tokenizers.WhitespaceSplit(), normalizer=normalizers.NFKC()),
    "json: stripping token": lambda: pattern(LLAMA_3, added=(AddedToken("<mask>", lstrip=True, rstrip=True),)),
}


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[TextTokenizer, Encoder]]:
    tokenizer = KINDS[request.param]()
    found = cutter(tokenizer)
    assert isinstance(found, Cutter), found
    yield tokenizer, Encoder(tokenizer, np.dtype(np.int32), append_eod=False, piece_chars=3)


def in_pieces(encoder: Encoder, text: str) -> list[int]:
    return np.frombuffer(encoder.encode([text])[0], np.int32).tolist()


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, piece_chars=st.integers(1, 30))
def test_pieces_have_the_ids_of_the_whole(kind: tuple[TextTokenizer, Encoder], text: str, piece_chars: int) -> None:
    tokenizer, encoder = kind
    encoder.piece_chars = piece_chars
    assert in_pieces(encoder, text) == tokenizer.encode(text)


def test_a_long_text_is_cut_everywhere(kind: tuple[TextTokenizer, Encoder]) -> None:
    """100,000 characters of the corpus and of hard parts: every piece but the last is about as long as asked for."""
    tokenizer, encoder = kind
    dice = random.Random(1)
    hard = ["".join(dice.choices(PARTS, k=8)) for _ in range(4000)]
    text = " ".join(part for pair in zip(hard, corpus() * 70) for part in (pair[0], pair[1][:60]))[:100_000]
    encoder.piece_chars = 1000
    assert in_pieces(encoder, text) == tokenizer.encode(text)
    assert encoder.whole_chars == 0
    found = cutter(tokenizer)
    assert isinstance(found, Cutter)
    lengths = []
    made = Cutter(found.next_cut, lambda piece, first: [lengths.append(len(piece)) or 0])
    assert len(list(made.pieces(text, 1000))) > 40 and max(lengths) < 5000


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: trained(model_type="bpe", normalization_rule_name="nmt_nfkc"), "normalizes text"),
        (lambda: trained(model_type="bpe", remove_extra_whitespaces=True), "normalizes text"),
        (lambda: trained(model_type="unigram"), "no multiples of 1/32"),
        (lambda: rounded(trained(model_type="unigram", user_defined_symbols=["x"])), "rounded along the text"),
        (lambda: trained(model_type="bpe", treat_whitespace_as_suffix=True), "behind words"),
        (lambda: pattern(LLAMA_3 + r"|x y"), "look across a cut: Split"),
        (lambda: pattern(LLAMA_3, normalizer=normalizers.Strip()), "look across a cut: Strip"),
        (lambda: pattern(LLAMA_3, added=(AddedToken("of the"),)), "look across a cut: Split"),
        (lambda: pattern(LLAMA_3, added=(AddedToken("x", single_word=True),)), "single words"),
        (lambda: pattern(LLAMA_3, added=(AddedToken("x", rstrip=True),)), "white space along"),
    ],
)  # fmt: skip
def test_tokenizers_that_are_not_cut_say_why(make: Any, reason: str) -> None:
    tokenizer = make()
    assert reason in str(cutter(tokenizer))
    encoder = Encoder(tokenizer, np.dtype(np.int32), append_eod=False, piece_chars=10)
    text = "x the of the x  x, " * 10
    assert in_pieces(encoder, text) == tokenizer.encode(text)
    assert encoder.whole_chars == len(text) and reason in encoder.whole_reason
