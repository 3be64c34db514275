"""Safetensors files, streamed: written tensor by tensor with checksums and fsync, read by byte range.

The format is Hugging Face's, which many tools read: 8 bytes of header length, a JSON header, raw little-endian data. The
library's own writer needs all tensors in memory, and neither syncs the file nor computes checksums. Here one tensor is in memory
at a time.

Torch-free.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1}
LARGEST_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library. A longer header would be read into memory before anything of it is known."""
_CHUNK_BYTES = 8 << 20


class DamagedFile(Exception):
    """A file whose length or content differs from what was written."""


class UnfitFile(DamagedFile):
    """A whole file that this configuration or version can't use. It is no damage, so no such file is renamed."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its type, shape, and the bytes [start, stop) counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Written:
    """The length of a written file, and the CRC-32 of each tensor's bytes by key."""

    num_bytes: int
    sums: dict[str, int]


def write_tensor_file(
    path: Path, heads: Sequence[tuple[str, str, tuple[int, ...]]], values: Iterable[NDArray[np.uint8]]
) -> Written:
    """Write a file of tensors. `heads`: (key, dtype, shape) of each. `values`: their raw bytes in the same order.

    The file is on the disk when this returns. It is written under its final name, because a checkpoint counts only once its
    COMPLETE marker exists. Raises OSError.
    """
    header: dict[str, object] = {}
    position = 0
    for key, dtype, shape in heads:
        size = prod(shape) * SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sums = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, dtype, shape), value in zip(heads, values, strict=True):
            assert value.nbytes == prod(shape) * SIZES[dtype], f"{key}: {value.nbytes} bytes for {dtype}{list(shape)}"
            sums[key] = _write_summed(file, value)
        file.flush()
        os.fsync(file.fileno())
        return Written(file.tell(), sums)


def _write_summed(file: BinaryIO, value: NDArray[np.uint8]) -> int:
    total = 0
    view = value.reshape(-1).data
    for start in range(0, len(view), _CHUNK_BYTES):
        part = view[start : start + _CHUNK_BYTES]
        total = zlib.crc32(part, total)
        file.write(part)
    return total


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The `TensorEntry` of each tensor by key. Raises DamagedFile when the header is invalid or the file's length is wrong."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length > LARGEST_HEADER_BYTES:
                raise DamagedFile(
                    f"{path} is no safetensors file: a header has at most {LARGEST_HEADER_BYTES} bytes, not {length}"
                )
            if not 2 <= length <= size - 8:
                raise DamagedFile(f"{path} is no safetensors file: its header would be {length} bytes of {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} has a header that is not JSON: {error}") from error
    first = 8 + length
    try:
        entries = {key: _entry(value, first) for key, value in header.items() if key != "__metadata__"}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{path} has a header that is not of safetensors: {error}") from error
    end = first
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            kind = "overlaps another tensor" if entry.start < end else f"leaves {entry.start - end} bytes before it unused"
            raise DamagedFile(f"{path}: data_offsets must be contiguous from 0 on, but {key} {kind}")
        end = entry.stop
    if size != end:
        raise DamagedFile(f"{path} is {size} bytes long, its header says {end}")
    return entries


def _entry(value: dict[str, Any], first: int) -> TensorEntry:
    """One entry of a header. `first`: the byte where the data begins. Raises TypeError, KeyError or ValueError if invalid."""
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in (*shape, start, stop)) or start > stop:
        raise ValueError(f"{dtype!r} {list(shape)} from {start!r} to {stop!r}")
    return TensorEntry(dtype, shape, first + start, first + stop)


def read_bytes(path: Path, entry: TensorEntry, expected_sum: int | None) -> NDArray[np.uint8]:
    """The raw bytes of one tensor. Raises DamagedFile, also when their CRC-32 differs from `expected_sum`; None: no check."""
    buffer = np.empty(entry.stop - entry.start, dtype=np.uint8)
    view = buffer.data
    try:
        with open(path, "rb", buffering=0) as file:
            position = 0
            while position < len(view):
                count = os.preadv(file.fileno(), [view[position : position + _CHUNK_BYTES]], entry.start + position)
                if count == 0:
                    raise DamagedFile(f"{path} ends at byte {entry.start + position}, before {entry.stop}")
                position += count
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror or error}") from error
    if expected_sum is not None and zlib.crc32(view) != expected_sum:
        raise DamagedFile(f"{path} holds other bytes than were written ({entry.start} to {entry.stop})")
    return buffer
