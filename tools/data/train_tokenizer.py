"""Trains a sentencepiece tokenizer. In: a corpus. Out: PATH.model, and an equal tokenizer.json beside it where there is one.

Text is not normalized and gets no dummy prefix. Characters outside the vocabulary become bytes; digits stay single. Ids: 0
<unk> (never produced), 1 <|endoftext|>, 2 to 257 the bytes, then the pieces. The same sources give the same file.

Torch-free.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from configs.errors import ConfigError, Problem
from pretrain.data.indexed import file_problem
from pretrain.data.tokenizer import load_tokenizer, section_for
from pretrain.run.files import write_atomically
from tools.data.faults import Faults
from tools.data.read.corpus import batches
from tools.data.read.find_files import Corpus
from tools.data.read.parse_documents import texts_of
from tools.data.tokenizer_json import equal_tokenizer

EOD = "<|endoftext|>"
PASSAGE_BYTES = 4096
"""Size of the passages that the trainer reads. They are whole lines, so that pieces may hold line breaks."""
SCORE_STEP = 2.0**-5
THREADS = 4
"""Fixed, since the expectation sums of a unigram model depend on the number of threads."""
SAMPLE_CHARS = 400_000


def train(
    corpus: Corpus,
    out: str,
    *,
    vocab_size: int = 32000,
    kind: str = "bpe",
    max_bytes: float = 64e6,
    text_key: str = "text",
    skip_bad: int = 0,
) -> dict[str, Any]:
    """Train a tokenizer, write it, and export it.

    `max_bytes`: amount of text, taken from every source in proportion to its size. Raises ConfigError.
    """
    path, beside = Path(out), Path(out).with_name("tokenizer.json")
    _check_out(path, beside)
    faults = Faults(skip_bad)
    texts = _texts(corpus, max_bytes, text_key, faults)
    proto = _train(texts, vocab_size, kind)
    backend, reason = equal_tokenizer(proto, _samples(texts))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        write_atomically(path, proto)
        if backend is not None:
            write_atomically(beside, backend.to_str(pretty=False).encode())
    except OSError as error:
        raise ConfigError(file_problem(error, path, "--out")) from error
    tokenizer = load_tokenizer(section_for(out))
    return {
        "path": str(path),
        "model": kind,
        **tokenizer.identity(),
        "eod_id": tokenizer.eod_id,
        "corpus": corpus.labels,
        "left_out": corpus.left_out_counts(),
        "skipped": faults.skipped(),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "tokenizer_json": str(beside) if backend is not None else None,
        "not_exported_because": reason,
    }


def _check_out(path: Path, beside: Path) -> None:
    problems = []
    if path.suffix != ".model":
        problems.append(Problem("--out", str(path), "the name must end in .model", f"--out {path}.model"))
    if path.is_dir():
        problems.append(Problem("--out", str(path), "must be a file, not a folder", "give another name"))
    if beside.exists() and not path.exists():
        rule = f"{beside} would be written too, and it is there already, with no {path.name} that it belongs to"
        problems.append(Problem("--out", str(path), rule, "give another folder, or move the file away"))
    if problems:
        raise ConfigError(problems)


def _texts(corpus: Corpus, max_bytes: float, text_key: str, faults: Faults) -> list[str]:
    """The training text: the head of each source, in proportion to its size. Held in memory, as the trainer does anyway."""
    total = sum(source.size_bytes for source in corpus.sources)
    texts: list[str] = []
    for source in corpus.sources:
        try:
            for batch in batches(source, text_key, max(max_bytes * source.size_bytes / max(total, 1), 1)):
                found, wrong = texts_of(batch, text_key)
                texts += found
                faults.lines += wrong
        except ConfigError as error:
            faults.sources += error.problems
    if not texts and not faults.fatal:
        faults.sources.append(Problem("--corpus", corpus.labels, "there must be some text", "name another corpus"))
    faults.check()
    return texts


def _passages(texts: list[str]) -> Iterator[str]:
    """Whole lines, together at most PASSAGE_BYTES. Longer lines are cut."""
    for text in texts:
        held, size = [], 0
        for line in text.splitlines(keepends=True):
            for first in range(0, len(line), PASSAGE_BYTES // 4):
                part = line[first : first + PASSAGE_BYTES // 4]
                part_bytes = len(part.encode())
                if size + part_bytes > PASSAGE_BYTES:
                    yield "".join(held)
                    held, size = [], 0
                held.append(part)
                size += part_bytes
        if held:
            yield "".join(held)


def _train(texts: list[str], vocab_size: int, kind: str) -> bytes:
    """The serialized model. Raises ConfigError."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_passages(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=EOD,
            max_sentence_length=2 * PASSAGE_BYTES,
            num_threads=THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:  # with the reason in words: vocabulary too large or too small for the text
        rule = f"sentencepiece must be able to train it: {str(error).split('] ')[-1]}"
        raise ConfigError(Problem("--vocab-size", vocab_size, rule, "change --vocab-size, or give more text")) from error
    return _round_scores(model.getvalue()) if kind == "unigram" else model.getvalue()


def _round_scores(proto: bytes) -> bytes:
    """Unigram scores as multiples of 1/32 nat.

    Their sums are then exact in float32 over some 80,000 tokens. Equally good segmentations tie in every implementation, so
    that sentencepiece and tokenizer.json choose the same one.
    """
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(proto)
    for piece in model.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    return model.SerializeToString()


def _samples(texts: list[str]) -> list[str]:
    """Parts of the corpus, on which the export is compared."""
    kept, size = [], 0
    for text in texts[:: max(len(texts) // 200, 1)]:
        if size < SAMPLE_CHARS:
            kept.append(text[: SAMPLE_CHARS // 10])
            size += len(kept[-1])
    return kept
