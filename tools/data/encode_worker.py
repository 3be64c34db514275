"""The work of a worker process: raw batches -> token bytes. In: `EncodingSettings` and a `DocumentBatch`. Out: an `EncodedBatch`.

A module of its own, so that a worker starts with few imports (0.2 s).

Torch-free.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from array import array
from dataclasses import dataclass
from functools import lru_cache

from configs import schema
from configs.errors import Problem
from pretrain.data.indexed import token_dtype
from pretrain.data.tokenizer import load_tokenizer
from tools.data.encode import Encoder, read_special_tokens_as_text
from tools.data.read.corpus import DocumentBatch
from tools.data.read.parse_documents import texts_of


@dataclass(frozen=True)
class EncodingSettings:
    """What a worker needs to know. Hashable, so that each worker loads its tokenizer once."""

    kind: str
    path: str
    eod: str | None
    append_eod: bool
    text_key: str
    special_as_text: bool = False


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of a batch as the .bin (tokens) and .idx (lengths, int32) hold them, and the size of their text.

    `whole_chars`, `whole_reason`: as the worker's Encoder has them.
    """

    read_bytes: int
    tokens: bytes = b""
    lengths: bytes = b""
    text_bytes: int = 0
    problems: tuple[Problem, ...] = ()
    whole_chars: int = 0
    whole_reason: str = ""


@lru_cache(maxsize=1)
def _encoder(job: EncodingSettings) -> Encoder:
    tokenizer = load_tokenizer(schema.TokenizerConfig(kind=job.kind, path=job.path, eod=job.eod))
    if job.special_as_text:
        read_special_tokens_as_text(tokenizer)
    return Encoder(tokenizer, token_dtype(tokenizer.vocab_size), job.append_eod)


def encode_batch(job: EncodingSettings, batch: DocumentBatch, check_only: bool) -> EncodedBatch:
    """Parse, check and encode the good documents of one batch. With `check_only` nothing is encoded."""
    texts, problems = texts_of(batch, job.text_key)
    if check_only:
        return EncodedBatch(batch.read_bytes, problems=tuple(problems))
    encoder = _encoder(job)
    documents = [tokens for tokens in encoder.encode(texts) if tokens]
    itemsize = array(encoder.typecode).itemsize
    lengths = array("i", (len(tokens) // itemsize for tokens in documents)).tobytes()
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    whole = (encoder.whole_chars, encoder.whole_reason)
    return EncodedBatch(batch.read_bytes, b"".join(documents), lengths, text_bytes, tuple(problems), *whole)


def exit_with_parent() -> None:
    """Make this worker ignore interrupts, which its parent handles, and exit when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
