"""Safetensors files, streamed: written piece by piece with checksums and fsync, read by byte range.

The format is Hugging Face's (8-byte header length, JSON header, raw little-endian data), so that any tool reads them.
The library's own writer needs all tensors at once, neither syncs nor sums; here memory is one piece.

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
_CHUNK_BYTES = 8 << 20


class DamagedFile(Exception):
    """A file that is shorter, longer or other than what was written."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its type, shape, and the bytes [start, stop) counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Written:
    """What a file holds: its length and the CRC-32 of each tensor's bytes."""

    num_bytes: int
    sums: dict[str, int]


def write_tensor_file(
    path: Path, heads: Sequence[tuple[str, str, tuple[int, ...]]], values: Iterable[NDArray[np.uint8]]
) -> Written:
    """Write tensors (key, dtype, shape) whose raw bytes come one by one in the same order. Raises OSError.

    The file is on the disk when this returns; it is written under its own name: a marker beside it says when it counts.
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
    """Key -> TensorEntry. Raises DamagedFile when the header is none or the file is not as long as it says."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
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
    """One tensor of a header; `first`: where the data begins. Raises TypeError, KeyError or ValueError for what is none."""
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in (*shape, start, stop)) or start > stop:
        raise ValueError(f"{dtype!r} {list(shape)} from {start!r} to {stop!r}")
    return TensorEntry(dtype, shape, first + start, first + stop)


def read_bytes(path: Path, entry: TensorEntry, expected_sum: int | None) -> NDArray[np.uint8]:
    """The raw bytes of one tensor, checked against its CRC-32. Raises DamagedFile."""
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
