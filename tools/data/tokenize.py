"""A corpus -> PREFIX.bin, PREFIX.idx and PREFIX.meta.json, in parallel and in bounded memory.

In: sources, a tokenizer. Out: the three files, and what they hold. Documents keep their order, and the files have the same
bytes for any number of workers: batches are handed out and taken back in order, at most three per worker at a time. Workers
are spawned processes that parse, check and encode. This process reads files and writes tokens.

Torch-free.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from pretrain.data.indexed import token_dtype
from pretrain.data.tokenizer import TextTokenizer
from tools.data.corpus import CorpusSource, DocumentBatch, batches
from tools.data.dataset_writer import DatasetWriter
from tools.data.encode_worker import EncodedBatch, EncodingSettings, encode_batch, exit_with_parent
from tools.data.progress import ProgressMeter

IN_FLIGHT = 3
MOST_PROBLEMS = 20
META_FORMAT = 1


def tokenize(
    sources: list[CorpusSource],
    tokenizer: TextTokenizer,
    prefix: str,
    *,
    workers: int = 1,
    append_eod: bool = True,
    text_key: str = "text",
    max_bytes: float | None = None,
    eod: str | None = None,
) -> dict[str, Any]:
    """Write the three files. Returns the content of .meta.json, and `elapsed_s`. Raises ConfigError with all problems."""
    job = EncodingSettings(tokenizer.kind, tokenizer.path, eod, append_eod, text_key)
    dtype = token_dtype(tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    problems: list[Problem] = []
    text_bytes, start_s = 0, time.monotonic()
    total_bytes = sum(source.size_bytes for source in sources)
    with DatasetWriter(prefix, dtype) as writer, ProgressMeter(total_bytes) as meter:
        feed = _feed(sources, text_key, max_bytes, problems)
        for done in _in_order(job, feed, workers, problems):
            problems += done.problems
            if len(problems) >= MOST_PROBLEMS:
                break
            if not problems:
                writer.add(done.tokens, done.lengths)
                counts += np.bincount(np.frombuffer(done.tokens, dtype), minlength=len(counts))
                text_bytes += done.text_bytes
            meter.update(done.read_bytes, len(done.tokens) // dtype.itemsize)
        if not problems and not writer.num_tokens:
            names = ", ".join(source.name for source in sources)
            problems.append(Problem("--corpus", names, "there must be some text", "name a corpus with text in it"))
        if problems:
            raise ConfigError(problems[:MOST_PROBLEMS])
        meta = {
            "format": META_FORMAT,
            "tokenizer": {**tokenizer.identity(), "eod_id": tokenizer.eod_id},
            "corpus": [source.name for source in sources],
            "num_documents": len(writer.lengths),
            "num_tokens": writer.num_tokens,
            "text_bytes": text_bytes,
            "dtype": dtype.name,
            "append_eod": append_eod,
            "max_token_id": int(np.flatnonzero(counts)[-1]),
            "unigram_entropy_nats": entropy_nats(counts),
        }
        writer.finish(meta)
    return {"prefix": prefix, **meta, "elapsed_s": time.monotonic() - start_s}


def entropy_nats(counts: np.ndarray) -> float:
    """-Σ p ln p over the frequencies of the ids: the loss of the best model that ignores the context."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _feed(
    sources: list[CorpusSource], text_key: str, max_bytes: float | None, problems: list[Problem]
) -> Iterator[DocumentBatch]:
    """All batches of all sources. A source that can't be read adds its problem; the next source follows."""
    left = max_bytes
    for source in sources:
        try:
            for batch in batches(source, text_key, left):
                yield batch
                left = None if left is None else left - batch.size_bytes
        except ConfigError as error:
            problems += error.problems
        if left is not None and left <= 0:
            return


def _in_order(
    job: EncodingSettings, feed: Iterator[DocumentBatch], workers: int, problems: list[Problem]
) -> Iterator[EncodedBatch]:
    """Encoded batches in the order of `feed`. Once `problems` has an entry, the remaining batches are only checked."""
    if workers == 1:
        yield from (encode_batch(job, batch, bool(problems)) for batch in feed)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=exit_with_parent)
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in feed:
            waiting.append(pool.submit(encode_batch, job, batch, bool(problems)))
            if len(waiting) >= IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
