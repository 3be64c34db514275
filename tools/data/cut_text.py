"""Where a long text may be cut, so that the ids of the pieces are the ids of the whole text.

In: a tokenizer. Out: a `Cutter`, or the reason why the tokenizer has none. Every rule here is a proof for the tokenizer at hand;
a tokenizer that no rule covers encodes a text in one piece. Tokenizers are of two kinds:

- They split a text into words by a pattern, and encode word by word (most tokenizer.json). A cut is allowed where no known part
  of such patterns reaches across.
- They merge or score the pieces of a vocabulary over the whole text (sentencepiece, and tokenizer.json made of it). A cut is
  allowed between two characters that stand together in no piece: no merge and no path leads across. Sums of unigram scores are
  also rounded along the text. The cut is exact where the rounding has no effect: all scores are multiples of 1/32, as in models
  of `phalanx data tokenizer`.

Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sentencepiece

from pretrain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, TextTokenizer

SPACE = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, USER_DEFINED, UNUSED = 1, 2, 4, 5
"""Numbers of sentencepiece_model.proto."""
STEP = 2.0**-5
RESETTING = (0, 2, 3)
"""From this version on sentencepiece keeps a path's score below 100,000, where multiples of STEP are exact in float32."""

CJK = "\u4e00-\u9fff"
SPACES = "(?<=[A-Za-z])(?= [A-Za-z])"
LINES = rf"(?<=[A-Za-z0-9.,;:!?{CJK}，。]\n)(?=[A-Za-z{CJK}])"
COMMAS = rf"(?<=[{CJK}])(?=[，。])"
ACROSS = re.compile(rf"[A-Za-z] [A-Za-z]|\n[A-Za-z{CJK}]|[{CJK}][，。]")
"""Added tokens that match it reach across a cut of SPACES, LINES or COMMAS."""
ALTERNATIVES = {
    r"'s", r"'t", r"'re", r"'ve", r"'m", r"'ll", r"'d", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"(?i:[sdmt]|ll|ve|re)",
    r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}",
    r"\s*[\r\n]+", r"\s*[\r\n]",
    r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[\p{P}\p{S}]+[\r\n]*",
    r"[一-龥぀-ゟ゠-ヿ]+", r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
}  # fmt: skip
"""Parts of the patterns of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen and DeepSeek. None matches a text across a cut of SPACES,
LINES or COMMAS, and none looks past a cut: what follows decides only about runs of white space, which end there.
"""
CONTEXT_FREE_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"}
WORD_SPLITS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}


@dataclass(frozen=True)
class Cutter:
    """`next_cut(text, at)`: the first place from `at` on where the text may be cut, or None. `encode`: the ids of a piece, with
    whether it is the first one.
    """

    next_cut: Callable[[str, int], int | None]
    encode: Callable[[str, bool], list[int]]

    def pieces(self, text: str, piece_chars: int) -> Iterator[list[int]]:
        """The ids of the text, piece by piece."""
        start = 0
        while start < len(text):
            end = self.next_cut(text, start + piece_chars) if start + piece_chars < len(text) else None
            yield self.encode(text[start:end], start == 0)
            start = len(text) if end is None else end


def cutter(tokenizer: TextTokenizer) -> Cutter | str:
    """The tokenizer's cutter, or why it has none."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _of_sentencepiece(tokenizer)
    assert isinstance(tokenizer, HuggingFaceTokenizer), "there are two kinds of tokenizers"
    return _of_hugging_face(tokenizer)


def _between_pieces(pieces: Iterable[str], space: str) -> Callable[[str, int], int | None]:
    """Cuts between characters that no piece holds side by side. One of the two must be a piece, since runs of unknown characters
    become one token. `space`: what a space of the text is in the pieces.
    """
    pieces = [piece.replace(" ", space) for piece in pieces]
    known = {piece for piece in pieces if len(piece) == 1}
    pairs = {piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1)}

    def next_cut(text: str, at: int) -> int | None:
        before = text[at - 1].replace(" ", space)
        for place in range(at, len(text)):
            after = space if text[place] == " " else text[place]
            if before + after not in pairs and (before in known or after in known):
                return place
            before = after
        return None

    return next_cut


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Cutter | str:
    from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415  (protobuf: 40 ms, for long texts only)

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(tokenizer.proto)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        return "only bpe and unigram models of sentencepiece are cut"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        return "the sentencepiece model normalizes text"
    if trainer.treat_whitespace_as_suffix:
        return "the sentencepiece model puts white space behind words"
    if trainer.model_type == UNIGRAM:
        version = tuple(int(part) for part in re.findall(r"\d+", sentencepiece.__version__)[:3])
        if version < RESETTING or any(piece.type == USER_DEFINED for piece in model.pieces):
            return "scores of this unigram model are rounded along the text"
        if not _is_exact(piece.score for piece in model.pieces if piece.type == NORMAL):
            return "scores of this unigram model are rounded along the text: they are no multiples of 1/32"
    texts = [piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)]
    rest = tokenizer.processor
    if normalizer.add_dummy_prefix:
        normalizer.add_dummy_prefix = False
        rest = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode(text: str, first: bool) -> list[int]:
        return tokenizer.processor.encode(text) if first else rest.encode(text)

    unused = {piece.piece for piece in model.pieces if piece.type == UNUSED and len(piece.piece) == 1}
    return Cutter(_between_pieces([text for text in texts if text not in unused], SPACE), encode)


def _is_exact(scores: Iterable[float]) -> bool:
    return all(score % STEP == 0 and abs(score) <= 1e6 for score in scores)


def _of_hugging_face(tokenizer: HuggingFaceTokenizer) -> Cutter | str:
    spec = json.loads(tokenizer.backend.to_str())
    normalizers = _flat(spec["normalizer"], "normalizers")
    splits = _flat(spec["pre_tokenizer"], "pretokenizers")
    added = spec["added_tokens"]
    if any(token["single_word"] for token in added):
        return "it has added tokens that must be single words"
    if next_cut := _by_words(normalizers, splits, added):
        return Cutter(next_cut, lambda text, first: tokenizer.encode(text))
    return _by_pieces(tokenizer, spec, normalizers, splits)


def _flat(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _flat(inner, name)] if part["type"] == "Sequence" else [part]


def _by_words(
    normalizers: list[dict[str, Any]], splits: list[dict[str, Any]], added: list[dict[str, Any]]
) -> Callable[[str, int], int | None] | None:
    """Cuts of a tokenizer that splits a text into words; None when its steps aren't all known."""
    if any(step["type"] not in CONTEXT_FREE_NORMALIZERS for step in normalizers):
        return None
    for token in added:
        text = token["content"]
        if ACROSS.search(text) or (token["rstrip"] and text[-1:].isalnum()) or (token["lstrip"] and text[:1].isalnum()):
            return None
    splitting = letters = prefixing = False  # letters: a step splits between letters and punctuation
    for step in splits:
        kind = step["type"]
        if kind == "ByteLevel":
            splitting, letters = splitting or step["use_regex"], letters or step["use_regex"]
            prefixing = prefixing or step["add_prefix_space"]
        elif kind == "Metaspace":
            splitting, prefixing = splitting or step["split"], True
        elif kind == "Split" and _is_known(step):
            parts = _alternatives(step["pattern"]["Regex"])
            splitting, letters = splitting or r"\s+" in parts, letters or any(r"\p{L" in part for part in parts)
        elif kind in WORD_SPLITS:
            splitting = True
        elif kind != "Digits" and (kind, step.get("behavior")) != ("Punctuation", "Isolated"):
            return None
    if not splitting:
        return None
    rules = [SPACES] if prefixing else [SPACES, LINES, *([COMMAS] if letters else [])]
    cuts = re.compile("|".join(rules))

    def next_cut(text: str, at: int) -> int | None:
        found = cuts.search(text, at)
        return found.start() if found else None

    return next_cut


def _is_known(step: dict[str, Any]) -> bool:
    """Whether a Split keeps each match of a pattern of known parts as a word."""
    pattern = step["pattern"].get("Regex")
    kept = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
    return kept and pattern is not None and set(_alternatives(pattern)) <= ALTERNATIVES


def _alternatives(pattern: str) -> list[str]:
    """The parts between the outer | of a pattern."""
    parts, depth, in_class, escaped = [""], 0, False, False
    for char in pattern:
        if not escaped and not in_class:
            depth += (char == "(") - (char == ")")
        if char == "|" and not depth and not in_class and not escaped:
            parts.append("")
            continue
        parts[-1] += char
        in_class = in_class if escaped or char not in "[]" else char == "["
        escaped = char == "\\" and not escaped
    return parts


def _by_pieces(
    tokenizer: HuggingFaceTokenizer, spec: dict[str, Any], normalizers: list[dict[str, Any]], splits: list[dict[str, Any]]
) -> Cutter | str:
    """The cutter of a tokenizer that has a vocabulary of pieces, as sentencepiece's."""
    model, added = spec["model"], spec["added_tokens"]
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return "it has added tokens that take white space along"
    space = " "
    for step in [*normalizers, *splits]:
        if step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            space = SPACE
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE and not step["split"]:
            space = SPACE
            step["prepend_scheme"] = "never"
        elif step["type"] == "Split" and step["pattern"] == {"String": " "} and space == SPACE:
            pass  # Gemma: no space is left to split at
        elif step["type"] != "Prepend":
            return f"it has steps that may look across a cut: {step['type']}"
    if model["type"] == "BPE":
        ends = (model["dropout"], model["continuing_subword_prefix"], model["end_of_word_suffix"], model["ignore_merges"])
        texts = list(model["vocab"])
        if any(ends) or any(re.fullmatch("(<0x[0-9A-F]{2}>){2,}", text) for text in texts):
            return "its BPE model has parts that may look across a cut"
        if model["unk_token"] is None and not (
            model["byte_fallback"] and all(f"<0x{k:02X}>" in model["vocab"] for k in range(256))
        ):
            return "its BPE model drops unknown characters, which joins those around them"
    elif model["type"] == "Unigram" and _is_exact(score for _, score in model["vocab"]):
        texts = [text for text, _ in model["vocab"]]
    else:
        return f"its {model['type']} model is made for whole texts"
    texts += [token["content"] for token in added]
    rest = _without_prefix(tokenizer, spec)

    def encode(text: str, first: bool) -> list[int]:
        return tokenizer.encode(text) if first else rest.encode(text, add_special_tokens=False).ids

    return Cutter(_between_pieces(texts, space), encode)


def _without_prefix(tokenizer: HuggingFaceTokenizer, spec: dict[str, Any]) -> Any:
    """The backend for all pieces but the first: nothing is put before the text. `spec` has Metaspace's prefix taken out."""
    kept = [step for step in _flat(spec["normalizer"], "normalizers") if step["type"] != "Prepend"]
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    backend = type(tokenizer.backend).from_str(json.dumps(spec))
    backend.encode_special_tokens = tokenizer.backend.encode_special_tokens
    return backend
