"""A corpus -> PREFIX.bin, PREFIX.idx and PREFIX.meta.json, in parallel and in bounded memory.

In: a corpus, a tokenizer. Out: the three files, and what they hold. Documents keep their order, and the files have the same
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
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from pretrain.data.indexed import token_dtype
from pretrain.data.tokenizer import TextTokenizer
from tools.data.dataset_writer import DatasetWriter
from tools.data.encode import special_tokens
from tools.data.encode_worker import EncodedBatch, EncodingSettings, encode_batch, exit_with_parent
from tools.data.faults import MOST_PROBLEMS, Faults, TokenizeFailed
from tools.data.progress import ProgressMeter
from tools.data.read.corpus import DocumentBatch, batches
from tools.data.read.find_files import Corpus, CorpusSource

IN_FLIGHT = 3
META_FORMAT = 1


def tokenize(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    prefix: str,
    *,
    workers: int = 1,
    append_eod: bool = True,
    text_key: str = "text",
    max_bytes: float | None = None,
    eod: str | None = None,
    skip_bad: int = 0,
    special_as_text: bool = False,
) -> dict[str, Any]:
    """Write the three files. Returns the content of .meta.json, `elapsed_s`, `skipped`: the bad lines that were passed over, and
    `whole`: (characters, reason) of the longest document that had to be encoded in one piece.

    Raises ConfigError with all problems, TokenizeFailed when a worker dies.
    """
    job = EncodingSettings(tokenizer.kind, tokenizer.path, eod, append_eod, text_key, special_as_text)
    dtype = token_dtype(tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    faults, whole = Faults(skip_bad), (0, "")
    text_bytes, start_s = 0, time.monotonic()
    total_bytes = sum(source.size_bytes for source in corpus.sources)
    with DatasetWriter(prefix, dtype) as writer, ProgressMeter(total_bytes) as meter:
        feed = _feed(corpus.sources, text_key, max_bytes, faults)
        for done in _in_order(job, feed, workers, faults):
            faults.lines += done.problems
            if faults.fatal and len(faults.sources) + len(faults.lines) >= MOST_PROBLEMS:
                break
            if not faults.fatal:
                writer.add(done.tokens, done.lengths)
                counts += np.bincount(np.frombuffer(done.tokens, dtype), minlength=len(counts))
                text_bytes += done.text_bytes
                whole = max(whole, (done.whole_chars, done.whole_reason))
            meter.update(done.read_bytes, len(done.tokens) // dtype.itemsize)
        if not faults.fatal and not writer.num_tokens:
            names = ", ".join(corpus.labels)
            faults.sources.append(Problem("--corpus", names, "there must be some text", "name a corpus with text in it"))
        faults.check()
        meta = {
            "format": META_FORMAT,
            "tokenizer": {**tokenizer.identity(), "eod_id": tokenizer.eod_id},
            "corpus": corpus.labels,
            "left_out": corpus.left_out_counts(),
            "num_skipped": len(faults.lines),
            "num_documents": len(writer.lengths),
            "num_tokens": writer.num_tokens,
            "text_bytes": text_bytes,
            "dtype": dtype.name,
            "append_eod": append_eod,
            "special_tokens": "text" if special_as_text else "token",
            "special_tokens_in_text": _spelled(tokenizer, counts, len(writer.lengths) if append_eod else 0),
            "max_token_id": int(np.flatnonzero(counts)[-1]),
            "unigram_entropy_nats": entropy_nats(counts),
        }
        writer.finish(meta)
    return {"prefix": prefix, **meta, "elapsed_s": time.monotonic() - start_s, "skipped": faults.skipped(), "whole": whole}


def _spelled(tokenizer: TextTokenizer, counts: np.ndarray, num_appended: int) -> dict[str, int]:
    """Name -> how often the text itself spells a special token that was encoded as such. `num_appended`: ends of documents that
    were appended.
    """
    found = {name: int(counts[number]) for number, name in special_tokens(tokenizer).items()}
    found[tokenizer.token(tokenizer.eod_id)] -= num_appended
    return {name: count for name, count in found.items() if count}


def entropy_nats(counts: np.ndarray) -> float:
    """-Σ p ln p over the frequencies of the ids: the loss of the best model that ignores the context."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _feed(sources: list[CorpusSource], text_key: str, max_bytes: float | None, faults: Faults) -> Iterator[DocumentBatch]:
    """All batches of all sources. A source that can't be read adds its problem; the next source follows."""
    left = max_bytes
    for source in sources:
        try:
            for batch in batches(source, text_key, left):
                yield batch
                left = None if left is None else left - batch.size_bytes
        except ConfigError as error:
            faults.sources += error.problems
        if left is not None and left <= 0:
            return


def _in_order(job: EncodingSettings, feed: Iterator[DocumentBatch], workers: int, faults: Faults) -> Iterator[EncodedBatch]:
    """Encoded batches in the order of `feed`. Once the faults are fatal, the remaining batches are only checked."""
    if workers == 1:
        yield from (encode_batch(job, batch, faults.fatal) for batch in feed)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=exit_with_parent)
    except OSError as error:
        raise _not_started(workers, error) from error
    waiting: deque[tuple[str, Future[EncodedBatch]]] = deque()
    try:
        for batch in feed:
            waiting.append((batch.source, _submitted(pool, workers, job, batch, faults.fatal)))
            if len(waiting) >= IN_FLIGHT * workers:
                yield _result(waiting, workers)
        while waiting:
            yield _result(waiting, workers)
    finally:
        _shut_down(pool)


def _shut_down(pool: ProcessPoolExecutor) -> None:
    """End the workers. A pool that was interrupted while it started, or whose threads could not start, can't do it itself."""
    with suppress(RuntimeError):
        pool.shutdown(cancel_futures=True)
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join()


def _submitted(
    pool: ProcessPoolExecutor, workers: int, job: EncodingSettings, batch: DocumentBatch, check_only: bool
) -> Future[EncodedBatch]:
    try:
        return pool.submit(encode_batch, job, batch, check_only)
    except BrokenProcessPool as error:
        raise _killed(workers, batch.source) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: can't start new thread
        raise _not_started(workers, error) from error


def _not_started(workers: int, error: Exception) -> TokenizeFailed:
    rule = f"this many processes must be able to start; no file was written: {error}"
    return TokenizeFailed(Problem("--workers", workers, rule, "give fewer --workers, or raise the limits: ulimit -a"))


def _result(waiting: deque[tuple[str, Future[EncodedBatch]]], workers: int) -> EncodedBatch:
    source, future = waiting.popleft()
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _killed(workers, source) from error
    except MemoryError as error:
        rule = f"each worker must have the memory for its documents; one had too little, at {source}"
        raise TokenizeFailed(Problem("--workers", workers, rule, "give fewer --workers or more memory")) from error


def _killed(workers: int, source: str) -> TokenizeFailed:
    rule = f"a worker process was killed or died, at or after {source}; no file was written"
    fix = "if memory ran out (the kernel's log says so: dmesg), give fewer --workers or more memory"
    return TokenizeFailed(Problem("--workers", workers, rule, fix))
