"""The bytes of a file, uncompressed, and its whole lines, in blocks of about a MiB. The whole file is never held.

In: a name, and the kind of compression or "". Out: iterators. Raises ConfigError when the compressed data is broken or truncated.

Torch-free.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from configs.errors import ConfigError, Problem

BATCH_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 12
"""Compressed bytes that are decompressed at a time. 4 KiB become at most 128 MiB: 45 bytes of bzip2 hold 900 kB of zeros."""
ZSTD_WINDOW_BYTES = 1 << 31
"""The largest window that zstd writes (--ultra --long=31). The decompressor holds the window that the file asks for."""
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
    """(uncompressed bytes, at most BATCH_BYTES; bytes of the file read for them). Raises ConfigError for broken or truncated
    data, and for data behind the compressed data.
    """
    with open(name, "rb", buffering=0) as file:
        if not compression:
            while chunk := file.read(BATCH_BYTES):
                yield chunk, len(chunk)
            return
        for plain, read in _decompressed(file, name, compression):
            for first in range(0, max(len(plain), 1), BATCH_BYTES):
                yield plain[first : first + BATCH_BYTES], read if not first else 0


def _decompressed(file: IO[bytes], name: str, compression: str) -> Iterator[tuple[bytes, int]]:
    """(uncompressed bytes, bytes read for them) of all members, frames or streams of a file."""
    fresh, faults = _decompression(compression)
    stream, begun, ended = fresh(), False, False
    while raw := file.read(COMPRESSED_BYTES):
        read = len(raw)
        while raw := raw.lstrip(b"\0") if ended and not begun else raw:  # zeros after a whole member are padding
            begun = True
            try:
                plain = stream.decompress(raw)
            except faults as error:
                raise ConfigError(_broken(name, compression, str(error))) from error
            raw = b""
            if stream.eof:
                raw, stream, begun, ended = stream.unused_data, fresh(), False, True
            yield plain, read
            read = 0
    if begun or not ended:
        raise ConfigError(_broken(name, compression, "it ends in the middle"))


def _decompression(kind: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """(function that makes a decompressor, its exceptions). All libraries have decompress, eof and unused_data."""
    if kind == "gzip":
        return (lambda: zlib.decompressobj(wbits=31)), (zlib.error,)
    if kind == "bzip2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    if kind == "xz":
        return lzma.LZMADecompressor, (lzma.LZMAError,)
    import zstandard  # noqa: PLC0415  (for zstd only)

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj, (zstandard.ZstdError,)


def _broken(name: str, compression: str, why: str) -> Problem:
    rule = f"the {compression} data must be whole: {why}"
    return Problem("--corpus", name, rule, "copy the file again, or leave it out")


def check_document_size(name: str, size_bytes: int, fix: str) -> None:
    """Raises ConfigError when a document exceeds LARGEST_DOCUMENT_BYTES."""
    if size_bytes > LARGEST_DOCUMENT_BYTES:
        rule = f"a document has at most {LARGEST_DOCUMENT_BYTES >> 20} MiB"
        raise ConfigError(Problem("--corpus", name, rule, fix))
