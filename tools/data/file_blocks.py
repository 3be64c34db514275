"""The bytes of a file, uncompressed, and its whole lines, in blocks of about a MiB. The whole file is never held.

In: a name, and `.gz`, `.zst` or "". Out: iterators. Raises ConfigError when the compressed data is broken or truncated.

Torch-free.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from configs.errors import ConfigError, Problem

BATCH_BYTES = 1 << 20
LARGEST_DOCUMENT_BYTES = 256 << 20
"""Size limit of one document, which is held in memory several times while it is encoded."""


def line_blocks(name: str, compression: str) -> Iterator[tuple[bytes, int, int, int]]:
    """(whole lines of about BATCH_BYTES, bytes read, number of the first line, its offset in the uncompressed text)."""
    held: list[bytes] = []
    size = read = offset = 0
    line = 1
    for chunk, read_bytes in chunks(name, compression):
        read += read_bytes
        end = chunk.rfind(b"\n") + 1
        held.append(chunk[:end] if end else chunk)
        size += len(held[-1])
        if end and size >= BATCH_BYTES:
            block = b"".join(held)
            yield block, read, line, offset
            line, offset, read = line + block.count(b"\n"), offset + len(block), 0
            held, size = [], 0
        if end and end < len(chunk):
            held.append(chunk[end:])
            size += len(held[-1])
        if not end:
            check_document_size(name, size, "is it JSON lines? one document a line")
    if size:
        yield b"".join(held), read, line, offset


def chunks(name: str, compression: str) -> Iterator[tuple[bytes, int]]:
    """(uncompressed bytes, bytes of the file read for them). Raises ConfigError for broken or truncated data."""
    with open(name, "rb", buffering=0) as file:
        if not compression:
            while chunk := file.read(BATCH_BYTES):
                yield chunk, len(chunk)
            return
        fresh, faults = _decompression(compression)
        stream, begun = fresh(), False
        try:
            while raw := file.read(1 << 16):  # small, since a chunk may grow a thousandfold
                read = len(raw)
                while raw:
                    plain, begun = stream.decompress(raw), True
                    raw = b""
                    if stream.eof:  # next member or frame; zeros after the last one are padding
                        raw, stream, begun = stream.unused_data.lstrip(b"\0"), fresh(), False
                    yield plain, read
                    read = 0
        except faults as error:
            raise ConfigError(_broken(name, compression, str(error))) from error
        if begun:
            raise ConfigError(_broken(name, compression, "it ends in the middle"))


def _decompression(suffix: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """(function that makes a decompressor, its exceptions). Both libraries have decompress, eof and unused_data."""
    if suffix == ".gz":
        return (lambda: zlib.decompressobj(wbits=31)), (zlib.error,)
    import zstandard  # noqa: PLC0415  (for .zst only)

    return zstandard.ZstdDecompressor().decompressobj, (zstandard.ZstdError,)


def _broken(name: str, compression: str, why: str) -> Problem:
    rule = f"the {compression} file must be whole: {why}"
    return Problem("--corpus", name, rule, "copy the file again, or leave it out")


def check_document_size(name: str, size_bytes: int, fix: str) -> None:
    """Raises ConfigError when a document exceeds LARGEST_DOCUMENT_BYTES."""
    if size_bytes > LARGEST_DOCUMENT_BYTES:
        rule = f"a document has at most {LARGEST_DOCUMENT_BYTES >> 20} MiB"
        raise ConfigError(Problem("--corpus", name, rule, fix))
