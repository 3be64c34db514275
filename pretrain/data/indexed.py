"""Megatron's token files: PREFIX.bin holds the tokens, PREFIX.idx says where each sequence begins.

In: a prefix. Out: an `Index` of memory-mapped arrays after fast checks, or a ConfigError that names the contradiction. The
rules by which documents are split into train and valid, and samples are counted, are here too. tools/data/dataset_writer.py
writes the files.

.idx, little endian: magic `MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, sequences u64, document marks u64, then
lengths int32 [sequences] in tokens, pointers int64 [sequences] in bytes, documents int64 [documents + 1] in sequences.

Torch-free.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from configs.errors import ConfigError, Problem

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SMALL_VOCAB = 65500
"""Megatron's bound. Vocabularies below it take two bytes a token, others four."""
CHECKED_ENTRIES = 2_000_000
"""The number of entries that a check reads, so that it takes 0.1 s. They are evenly spread blocks of a longer index."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The element type of .bin that Megatron's own tool chooses for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCAB else np.int32)


def dtype_code(dtype: np.dtype) -> int:
    """The code of an integer type in an .idx header."""
    return next(code for code, kind in DTYPES.items() if np.dtype(kind) == dtype)


def idx_path(prefix: str) -> Path:
    """The index file of a token file's prefix."""
    return Path(f"{prefix}.idx")


def bin_path(prefix: str) -> Path:
    """The file of the tokens themselves."""
    return Path(f"{prefix}.bin")


def meta_path(prefix: str) -> Path:
    """The file that names the tokenizer and counts documents and tokens."""
    return Path(f"{prefix}.meta.json")


@dataclass(frozen=True)
class Index:
    """An opened .idx: lengths int32 [sequences] tokens, pointers int64 [sequences] bytes, documents int64 [documents + 1]."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray
    bin_bytes: int

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        return self.tokens_before(self.num_sequences)

    def tokens_before(self, sequence: int) -> int:
        """The number of tokens in all sequences before this one. It is exact, because the sequences are contiguous."""
        if sequence < self.num_sequences:
            return int(self.pointers[sequence]) // self.dtype.itemsize
        return 0 if not sequence else int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def document_of(self, sequence: int) -> int:
        """The document that holds a sequence. A file's arrays lie unaligned, and np.searchsorted would copy them whole."""
        return bisect_right(self.documents, sequence) - 1

    def tokens(self) -> np.ndarray:
        """All tokens, memory-mapped: [num_tokens]."""
        return np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")

    def document_tokens(self, document: int) -> np.ndarray:
        """Tokens of one document: [length]."""
        first, end = (self.tokens_before(int(self.documents[document + k])) for k in (0, 1))
        return np.asarray(self.tokens()[first:end])


def _missing(prefix: str, key: str) -> list[Problem]:
    """Problems of a .bin or .idx that doesn't exist, is no file, or is empty."""
    found = []
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            rule = "PREFIX.bin and PREFIX.idx must both exist"
            found.append(Problem(key, str(path), rule, "give the prefix of existing files, or make them: phalanx data tokenize"))
        elif path.stat().st_size == 0:
            found.append(Problem(key, str(path), "the file must not be empty", "tokenise again: phalanx data tokenize"))
    return found


def _header_problem(raw: bytes, size: int) -> str | None:
    """The rule that the header or the size of an .idx breaks. None: it breaks none."""
    if len(raw) < HEADER.size:
        return f"an .idx has a header of {HEADER.size} bytes, this file has {size}"
    magic, version, code, sequences, marks = HEADER.unpack(raw)
    if magic != MAGIC:
        return f"an .idx begins with {MAGIC!r}, this file with {magic!r}"
    if version != VERSION:
        return f"the .idx version must be {VERSION}, it is {version}"
    if code not in DTYPES:
        return f"the dtype code must be one of {sorted(DTYPES)} (integers), it is {code}"
    expected = HEADER.size + 12 * sequences + 8 * marks
    if size not in (expected, expected + sequences):
        return f"{sequences} sequences and {marks} document marks make a file of {expected} bytes, it has {size}"
    if not sequences or marks < 2:
        return f"there must be a sequence and a document, the header says {sequences} and {max(marks - 1, 0)}"
    return None


def open_index(prefix: str, key: str = "data") -> Index:
    """Open PREFIX.idx after checking its header and the sizes of both files.

    Raises ConfigError, whose problems name the config key `key`.
    """
    problems = _missing(prefix, key)
    if problems:
        raise ConfigError(problems)
    path, bin_bytes = idx_path(prefix), bin_path(prefix).stat().st_size
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER.size)
        rule = _header_problem(raw, path.stat().st_size)
        if rule:
            raise ConfigError(Problem(key, str(path), rule, "the index is damaged or no Megatron index: tokenise again"))
        _, _, code, sequences, marks = HEADER.unpack(raw)
        data = np.memmap(path, mode="r")
    except OSError as error:
        raise ConfigError(file_problem(error, path, key)) from error
    lengths = np.frombuffer(data, np.int32, sequences, HEADER.size)
    pointers = np.frombuffer(data, np.int64, sequences, HEADER.size + 4 * sequences)
    documents = np.frombuffer(data, np.int64, marks, HEADER.size + 12 * sequences)
    index = Index(str(prefix), np.dtype(DTYPES[code]), lengths, pointers, documents, bin_bytes)
    stated = int(pointers[-1]) + int(lengths[-1]) * index.dtype.itemsize
    if stated != bin_bytes:
        word = "is truncated" if bin_bytes < stated else "is longer than its index says"
        rule = f"the index describes {stated} bytes, the .bin has {bin_bytes}: it {word}"
        raise ConfigError(Problem(key, str(bin_path(prefix)), rule, "copy or tokenise both files again"))
    return index


def _blocks(count: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover [0, count), or, above `limit` entries, 64 evenly spread blocks of limit / 64 entries with both ends."""
    if count <= limit:
        yield 0, count
        return
    size = max(limit // 64, 2)
    for first in np.linspace(0, count - size, 64).astype(np.int64):
        yield int(first), int(first) + size


def index_problems(index: Index, key: str = "data", limit: int | None = CHECKED_ENTRIES) -> list[Problem]:
    """Problems of entries that contradict each other. `limit`: how many entries to read.

    None reads all of them, which costs 24 bytes a sequence.
    """
    limit = limit or max(index.num_sequences, len(index.documents))
    path, fix = str(idx_path(index.prefix)), "the index is damaged: tokenise again"
    found: dict[str, Problem] = {}

    def lie(kind: str, rule: str) -> None:
        found.setdefault(kind, Problem(key, path, rule, fix))

    if index.pointers[0] != 0:
        lie("start", f"the first sequence begins at byte 0, the index says {int(index.pointers[0])}")
    for first, end in _blocks(index.num_sequences, limit):
        lengths, pointers = index.lengths[first:end].astype(np.int64), index.pointers[first:end]
        if (negative := np.flatnonzero(lengths < 0)).size:
            at = int(negative[0])
            lie("length", f"a length is at least 0, sequence {first + at} has {int(lengths[at])}")
        if (falling := np.flatnonzero(np.diff(pointers) != lengths[:-1] * index.dtype.itemsize)).size:
            at = int(falling[0])
            lie("pointer", f"sequences lie one after another, sequence {first + at + 1} begins at byte {int(pointers[at + 1])}")
    marks = index.documents
    if marks[0] != 0 or marks[-1] != index.num_sequences:
        rule = f"document marks run from 0 to the {index.num_sequences} sequences, they run from {marks[0]} to {marks[-1]}"
        lie("ends", rule)
    for first, end in _blocks(len(marks), limit):
        if (falling := np.flatnonzero(np.diff(marks[first:end]) < 0)).size:
            lie("order", f"document marks never decrease, mark {first + int(falling[0]) + 1} does")
    return list(found.values())


def held_out(index: Index, fraction: float) -> tuple[range, range]:
    """(train, valid) ranges of sequences. The last `fraction` of the documents, and at least one document, is held out.

    `valid` is empty when `fraction` is 0 or the index has a single document.
    """
    count = min(max(round(index.num_documents * fraction), 1), index.num_documents - 1) if fraction > 0 else 0
    border = int(index.documents[index.num_documents - count])
    return range(border), range(border, index.num_sequences)


def samples_in(index: Index, sequences: range, seq_length_tokens: int) -> int:
    """The number of samples in one epoch. Neighbouring samples share one token, and an incomplete last sample is dropped."""
    if not len(sequences):
        return 0
    tokens = index.tokens_before(sequences.stop) - index.tokens_before(sequences.start)
    return max(tokens - 1, 0) // seq_length_tokens


def index_sha256(prefix: str) -> str:
    """The sha256 of the .idx, which identifies the data. Reads 20 bytes a document; cached while the file is unchanged."""
    stat = idx_path(prefix).stat()
    return _sha256(str(idx_path(prefix)), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_problem(error: OSError, path: os.PathLike[str] | str, key: str) -> Problem:
    """The Problem that reports an error of the operating system on a file."""
    fix = "check that the folder exists, is writable and has space" if error.errno != 2 else "give an existing path"
    return Problem(key, str(path), f"the file must be usable: {error.strerror or error}", fix)
