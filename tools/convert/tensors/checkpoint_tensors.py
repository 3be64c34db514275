"""The tensors of a Phalanx checkpoint by canonical name, rows of any, whatever layout wrote them. numpy only.

In: a checkpoint folder. Out: `CheckpointTensors`. Every slice that is used is compared with its CRC-32. The sum is computed
while the slice is read in order, else by a pass of its own.

Torch-free.
"""

from __future__ import annotations

import os
import threading
import zlib
from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.manifest import Manifest, StoredSlice, read_index, read_manifest
from pretrain.checkpoint.tensor_file import DamagedFile, TensorEntry, read_header
from pretrain.model.tensor_slice import TensorSlice, split_range
from tools.convert.hf_files import read_exactly
from tools.convert.tensors.dtypes import FLOATS, Array, convert

_CHUNK_BYTES = 8 << 20


class _Slices:
    """The slices of one tensor, sorted by their first dim, so that the slices with some rows (or one expert) are found fast."""

    def __init__(self, slices: list[StoredSlice]) -> None:
        self.slices = sorted(slices, key=lambda stored: stored.tensor_slice.offset[:1])
        self.starts = [sum(stored.tensor_slice.offset[:1]) for stored in self.slices]
        ends = (start + prod(stored.tensor_slice.shape[:1]) for start, stored in zip(self.starts, self.slices))
        self.ends = list(accumulate(ends, max))

    def near(self, wanted: TensorSlice) -> list[StoredSlice]:
        """All slices that may overlap `wanted`."""
        first, last = sum(wanted.offset[:1]), sum(wanted.offset[:1]) + prod(wanted.shape[:1])
        return self.slices[bisect_right(self.ends, first) : bisect_left(self.starts, last)]


class CheckpointTensors:
    """The weights of one complete checkpoint. Any number of threads may read at once. Raises DamagedFile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        slices: dict[str, list[StoredSlice]] = {}
        for stored in read_index(folder):
            if stored.kind == "weight":
                slices.setdefault(stored.name, []).append(stored)
        self._slices = {name: _Slices(group) for name, group in slices.items()}
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self._opened: dict[str, int] = {}
        self._checked: set[str] = set()
        self._begun: dict[str, tuple[StoredSlice, TensorEntry, int, int]] = {}
        self._lock = threading.Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest.tensors[name]["shape"])

    def dtype(self, name: str) -> str:
        return self.manifest.tensors[name]["dtype"]

    @property
    def tensors(self) -> dict[str, Any]:
        return self.manifest.tensors

    def read_into(self, name: str, lead: tuple[int, ...], first: int, out: Array) -> None:
        """Fill `out` [rows, columns] with the rows of tensor[lead] from `first` on, in the tensor's type. Raises DamagedFile.

        The checksums of slices that were read in part are open until `verify_pending` is called.
        """
        inner = self.shape(name)[len(lead) + 1 :]
        wanted = TensorSlice((*lead, first, *(0 for _ in inner)), (*(1 for _ in lead), len(out), *inner))
        result, dtype = out.reshape(wanted.shape), self.dtype(name)
        slices = self._slices[name].near(wanted) if name in self._slices else []
        filled = sum(self._fill(stored, wanted, result, dtype) for stored in slices)
        if filled != wanted.size:
            raise DamagedFile(f"{self.folder} holds {filled} of {wanted.size} elements of {name}[{first}:{first + len(out)}]")

    def _fill(self, stored: StoredSlice, wanted: TensorSlice, result: Array, dtype: str) -> int:
        """Copy the part of `wanted` that `stored` holds. Returns the number of elements."""
        if stored.tensor_slice.overlap(wanted) is None:
            return 0
        entry = self._entry(stored)
        filled = 0
        for at, held in split_range(stored.tensor_slice, stored.start, stored.stop):
            common = held.overlap(wanted)
            if common is None:
                continue
            strides = [prod(held.shape[dim + 1 :]) for dim in range(len(held.shape))]
            low = sum((a - b) * s for a, b, s in zip(common.offset, held.offset, strides))
            high = low + sum((n - 1) * s for n, s in zip(common.shape, strides)) + 1
            place = result[common.slices_of(wanted)]
            if high - low == common.size and entry.dtype == dtype and place.flags.c_contiguous:
                self._read(stored, entry, at - stored.start + low, place)
            else:
                raw = np.empty(high - low, dtype=FLOATS[entry.dtype])
                self._read(stored, entry, at - stored.start + low, raw)
                part = np.lib.stride_tricks.as_strided(raw, common.shape, [s * raw.itemsize for s in strides])
                place[...] = convert(part, entry.dtype, dtype)
            filled += common.size
        return filled

    def _entry(self, stored: StoredSlice) -> TensorEntry:
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

    def _check(self, stored: StoredSlice, entry: TensorEntry, position: int = 0, total: int = 0) -> None:
        """Compare a slice with its checksum. `total`: the CRC-32 of its bytes before `position`."""
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, entry.stop - entry.start - position)))
        position += entry.start
        while position < entry.stop:
            view = buffer[: min(_CHUNK_BYTES, entry.stop - position)]
            read_exactly(self._opened[stored.file], view, position, self.folder / stored.file)
            total = zlib.crc32(view, total)
            position += len(view)
        if total != stored.crc32:
            raise DamagedFile(f"{self.folder / stored.file} holds other bytes than were written: {stored.key}")
        self._checked.add(stored.key)

    def _read(self, stored: StoredSlice, entry: TensorEntry, first: int, out: Array) -> None:
        """Read elements of a slice from `first` on, and add them to the slice's CRC-32."""
        view = out.reshape(-1).view(np.uint8).data
        start = first * out.itemsize
        read_exactly(self._opened[stored.file], view, entry.start + start, self.folder / stored.file)
        if stored.key in self._checked:
            return
        with self._lock:
            begun = self._begun.pop(stored.key, None)
        position, total = (begun[2], begun[3]) if begun else (0, 0)
        if position != start or (begun is None and start):
            # The slice is read out of order, or by another thread as well: one pass over the slice checks it.
            self._check(stored, entry)
            return
        total, position = zlib.crc32(view, total), position + len(view)
        if position < entry.stop - entry.start:
            with self._lock:
                self._begun[stored.key] = (stored, entry, position, total)
        else:
            self._check(stored, entry, position, total)

    def verify_pending(self) -> None:
        """Compare every slice that was read in part with its checksum. Raises DamagedFile."""
        begun, self._begun = self._begun, {}
        for stored, entry, position, total in begun.values():
            if stored.key not in self._checked:
                self._check(stored, entry, position, total)

    def check_all(self) -> int:
        """Compare every slice of the weights with its checksum. Returns the number of slices. Raises DamagedFile."""
        slices = [stored for group in self._slices.values() for stored in group.slices]
        for stored in slices:
            self._check(stored, self._entry(stored))
        return len(slices)

    def close(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)
        self._opened = {}
