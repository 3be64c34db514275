"""A `CorpusSource` -> batches of raw documents, in order and in bounded memory.

In: a source of tools/data/read/find_files.py. Out: the `DocumentBatch`es of it, of about a MiB. Only Parquet and JSON arrays
are parsed here. The workers parse the other batches (tools/data/read/parse_documents.py).

Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from configs.errors import ConfigError, Problem
from pretrain.data.indexed import file_problem
from tools.data.read import embedded_corpus
from tools.data.read.file_blocks import BATCH_BYTES, check_document_size, chunks, line_blocks
from tools.data.read.find_files import CorpusSource
from tools.data.read.parquet_file import rows


@dataclass(frozen=True)
class DocumentBatch:
    """Raw documents: either `lines`, a block of JSON lines, or `documents`, tuples (name, offset, text). Text None: a row of
    Parquet that has no text.

    Line numbers count from 1. `read_bytes`: how many bytes of its source the batch used up.
    """

    source: str
    read_bytes: int
    lines: bytes = b""
    first_line: int = 1
    first_offset_bytes: int = 0
    documents: tuple[tuple[str, int, bytes | None], ...] = ()
    is_text_file: bool = False

    @property
    def size_bytes(self) -> int:
        return len(self.lines) + sum(len(text or b"") for _, _, text in self.documents)


MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ": ".xz", b"BZh": ".bz2", b"PAR1": ".parquet"}
"""How the files begin that are often misnamed."""
BATCH_DOCUMENTS = 1 << 16
"""Bound of a batch whose documents are tiny or empty."""


def batches(source: CorpusSource, text_key: str, max_bytes: float | None = None) -> Iterator[DocumentBatch]:
    """The batches of a source; with `max_bytes` only the first ones, about that many bytes. Raises ConfigError at the first
    fault.
    """
    left = float("inf") if max_bytes is None else max_bytes
    readers: dict[str, Callable[[CorpusSource, str], Iterator[DocumentBatch]]] = {
        "embedded": _embedded,
        "text": _text,
        "blocks": _blocks,
        "lines": _lines,
        "array": _array,
        "parquet": _parquet,
    }
    try:
        for batch in readers[source.form](source, text_key):
            if batch.size_bytes > left:
                batch = _head(batch, int(left))
            yield batch
            left -= batch.size_bytes
            if left <= 0:
                return
    except OSError as error:
        raise ConfigError(file_problem(error, source.name, "--corpus")) from error


def _head(batch: DocumentBatch, size_bytes: int) -> DocumentBatch:
    """The first lines or documents of a batch, at least one, until `size_bytes` are reached."""
    if batch.lines:
        end = batch.lines.find(b"\n", size_bytes)
        lines = batch.lines if end < 0 else batch.lines[: end + 1]
        return replace(batch, lines=lines)
    kept, size = 0, 0
    while kept < len(batch.documents) and size < size_bytes:
        size += len(batch.documents[kept][2] or b"")
        kept += 1
    return replace(batch, documents=batch.documents[: max(kept, 1)])


def _gather(name: str, documents: Iterator[tuple[str, int, bytes | None, int]]) -> Iterator[DocumentBatch]:
    """Batches of about BATCH_BYTES from (name, offset, text, bytes read)."""
    held: list[tuple[str, int, bytes | None]] = []
    size = read = 0
    for label, offset, text, read_bytes in documents:
        held.append((label, offset, text))
        size, read = size + len(text or b""), read + read_bytes
        if size >= BATCH_BYTES or len(held) >= BATCH_DOCUMENTS:
            yield DocumentBatch(name, read, documents=tuple(held))
            held, size, read = [], 0, 0
    if held:
        yield DocumentBatch(name, read, documents=tuple(held))


def _embedded(source: CorpusSource, text_key: str) -> Iterator[DocumentBatch]:
    return _gather(source.label, ((name, 0, text, len(text)) for name, text in embedded_corpus.documents()))


def _text(source: CorpusSource, text_key: str) -> Iterator[DocumentBatch]:
    """The whole file is one document."""
    parts, size, read = [], 0, 0
    for chunk, read_bytes in chunks(source.name, source.compression):
        parts.append(chunk)
        size, read = size + len(chunk), read + read_bytes
        check_document_size(source.name, size, "cut the file, use JSON lines, or --split-blank-lines")
    yield DocumentBatch(source.label, read, documents=((source.label, 0, b"".join(parts)),), is_text_file=True)


def _blocks(source: CorpusSource, text_key: str) -> Iterator[DocumentBatch]:
    """Every run of lines without a blank line is one document."""

    def blocks() -> Iterator[tuple[str, int, bytes, int]]:
        held: list[bytes] = []
        start = offset = size = read = 0
        for block, read_bytes, _, _ in line_blocks(source.name, source.compression):
            read += read_bytes
            for line in block.splitlines(keepends=True):
                if line.strip():
                    start = start if held else offset
                    held.append(line)
                    size += len(line)
                elif held:
                    yield source.label, start, b"".join(held), read
                    held, size, read = [], 0, 0
                offset += len(line)
            check_document_size(source.name, size, "the text has no blank lines: cut it, or use JSON lines")
        if held:
            yield source.label, start, b"".join(held), 0

    return (replace(batch, is_text_file=True) for batch in _gather(source.label, blocks()))


def _lines(source: CorpusSource, text_key: str) -> Iterator[DocumentBatch]:
    for block, read_bytes, line, offset in line_blocks(source.name, source.compression):
        yield DocumentBatch(source.label, read_bytes, block, line, offset)


def _array(source: CorpusSource, text_key: str) -> Iterator[DocumentBatch]:
    """A JSON array of objects or texts. A file that doesn't begin with [ is read as JSON lines."""
    parts_of_file = chunks(source.name, source.compression)
    first = next(parts_of_file, (b"", 0))
    if not first[0].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _lines(source, text_key)
        return
    parts, size = [], 0
    for chunk, _ in chain([first], parts_of_file):
        parts.append(chunk)
        size += len(chunk)
        check_document_size(source.name, size, "make JSON lines of the array: they are read one by one")
    try:
        items: list[Any] = json.loads(b"".join(parts).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(not_utf8(source.name, 0, error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(Problem("--corpus", source.name, f"the file must be JSON: {error}", "mend the file")) from error
    # One object per line, as in a file of JSON lines, so that messages count array items.
    lines = b"".join(json.dumps(item if isinstance(item, dict) else {text_key: item}).encode() + b"\n" for item in items)
    yield DocumentBatch(source.label, source.size_bytes, lines)


def _parquet(source: CorpusSource, text_key: str) -> Iterator[DocumentBatch]:
    """The rows of one column, in batches by bytes."""
    return _gather(
        source.label, ((f"{source.label} row {row}", 0, text, read) for row, text, read in rows(source.name, text_key))
    )


def not_utf8(name: str, offset_bytes: int, error: UnicodeDecodeError) -> Problem:
    """The problem of text that isn't UTF-8, with the offset in the uncompressed file."""
    raw, at = error.object, error.start
    rule = f"text must be UTF-8; byte {offset_bytes + at} is 0x{raw[at]:02x} ({error.reason})"
    fix = "convert it, e.g.: iconv -f LATIN1 -t UTF-8"
    if offset_bytes == 0 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        fix = "it begins as UTF-16 does; convert it: iconv -f UTF-16 -t UTF-8"
    elif offset_bytes == 0 and (suffix := next((end for start, end in MAGIC.items() if raw.startswith(start)), None)):
        fix = f"it begins as a {suffix} file does; add {suffix} to its name"
    return Problem("--corpus", name, rule, fix)
