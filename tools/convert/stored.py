"""A Phalanx checkpoint as tensors by canonical name, rows of any, whatever layout wrote it. numpy only. [p]

In: a checkpoint folder. Out: `CheckpointTensors`. A slice is checked against its CRC-32 before its first use.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from pretrain.boxes import Box, split_range
from pretrain.manifest import Manifest, Stored, read_index, read_manifest
from pretrain.tensor_file import DamagedFile, Entry, read_header
from tools.convert.dtypes import FLOATS, Array, convert
from tools.convert.hf_files import read_exactly

_CHUNK_BYTES = 8 << 20


class CheckpointTensors:
    """The weights of one complete checkpoint. Reads from any number of threads. Raises DamagedFile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._slices: dict[tuple[str, int | None], list[Stored]] = {}
        for stored in read_index(folder):
            if stored.kind == "weight":
                self._slices.setdefault(self._place(stored.name, stored.box), []).append(stored)
        self._headers: dict[str, dict[str, Entry]] = {}
        self._opened: dict[str, int] = {}
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    @staticmethod
    def _place(name: str, box: Box) -> tuple[str, int | None]:
        """Slices of one expert are found without walking over the others'."""
        return (name, box.offset[0]) if len(box.shape) > 1 and box.shape[0] == 1 else (name, None)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest.tensors[name]["shape"])

    def dtype(self, name: str) -> str:
        return self.manifest.tensors[name]["dtype"]

    def read_rows(self, name: str, lead: tuple[int, ...], first: int, rows: int) -> Array:
        """Rows [first, first + rows) of tensor[lead] as [rows, columns] (a vector has one column), in its own type."""
        shape, dtype = self.shape(name), self.dtype(name)
        inner = shape[len(lead) + 1 :]
        wanted = Box((*lead, first, *(0 for _ in inner)), (*(1 for _ in lead), rows, *inner))
        result = np.empty(wanted.shape, dtype=FLOATS[dtype])
        filled = 0
        for stored in self._candidates(name, wanted):
            filled += self._fill(stored, wanted, result, dtype)
        if filled != wanted.size:
            raise DamagedFile(f"{self.folder} holds {filled} of {wanted.size} elements of {name}[{first}:{first + rows}]")
        return result.reshape(rows, prod(inner))

    def _candidates(self, name: str, wanted: Box) -> Iterator[Stored]:
        yield from self._slices.get((name, None), [])
        if len(wanted.shape) > 1:
            for index in range(wanted.offset[0], wanted.offset[0] + wanted.shape[0]):
                yield from self._slices.get((name, index), [])

    def _fill(self, stored: Stored, wanted: Box, result: Array, dtype: str) -> int:
        """Copy what `stored` holds of `wanted`; the number of elements."""
        if stored.box.overlap(wanted) is None:
            return 0
        entry = self._entry(stored)
        filled = 0
        for at, held in split_range(stored.box, stored.start, stored.stop):
            common = held.overlap(wanted)
            if common is None:
                continue
            strides = [prod(held.shape[dim + 1 :]) for dim in range(len(held.shape))]
            low = sum((a - b) * s for a, b, s in zip(common.offset, held.offset, strides))
            high = low + sum((n - 1) * s for n, s in zip(common.shape, strides)) + 1
            raw = self._read(stored, entry, at - stored.start + low, high - low)
            part = np.lib.stride_tricks.as_strided(raw, common.shape, [s * raw.itemsize for s in strides])
            result[common.slices_of(wanted)] = convert(part, entry.dtype, dtype)
            filled += common.size
        return filled

    def _entry(self, stored: Stored) -> Entry:
        with self._lock:
            if stored.file not in self._headers:
                self._headers[stored.file] = read_header(self.folder / stored.file)
                self._opened[stored.file] = os.open(self.folder / stored.file, os.O_RDONLY)
            entry = self._headers[stored.file].get(stored.key)
        if entry is None:
            raise DamagedFile(f"{self.folder / stored.file} lacks {stored.key}")
        if entry.dtype not in FLOATS:
            raise DamagedFile(f"{self.folder / stored.file}: {stored.key} is of type {entry.dtype}")
        return entry

    def _check(self, stored: Stored, entry: Entry) -> None:
        total, position = 0, entry.start
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, entry.stop - entry.start)))
        while position < entry.stop:
            view = buffer[: min(_CHUNK_BYTES, entry.stop - position)]
            read_exactly(self._opened[stored.file], view, position, self.folder / stored.file)
            total = zlib.crc32(view, total)
            position += len(view)
        if total != stored.crc32:
            raise DamagedFile(f"{self.folder / stored.file} holds other bytes than were written: {stored.key}")

    def _read(self, stored: Stored, entry: Entry, first: int, count: int) -> Array:
        dtype = FLOATS[entry.dtype]
        buffer = np.empty(count, dtype=dtype)
        start = entry.start + first * dtype.itemsize
        whole = count * dtype.itemsize == entry.stop - entry.start
        if not whole and stored.key not in self._checked:
            self._check(stored, entry)
            self._checked.add(stored.key)
        read_exactly(self._opened[stored.file], buffer.view(np.uint8).data, start, self.folder / stored.file)
        if whole and zlib.crc32(buffer.view(np.uint8).data) != stored.crc32:
            raise DamagedFile(f"{self.folder / stored.file} holds other bytes than were written: {stored.key}")
        return buffer

    def check_all(self) -> int:
        """Hold every slice of the weights against its sum; the number of slices."""
        slices = [stored for group in self._slices.values() for stored in group]
        for stored in slices:
            self._check(stored, self._entry(stored))
        return len(slices)

    def close(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)
        self._opened = {}
