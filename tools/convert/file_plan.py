"""Layout of tensor files to the byte: where each tensor lies, and in which units it is written.

In: tensors to be written. Out: `PlannedFile`s with a header and `WriteUnit`s. Format: safetensors.

Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tools.convert.tensors.dtypes import FLOATS

UNIT_BYTES = 32 << 20
"""Largest part of a tensor that one thread writes, when its rows can be written separately."""
BLOCK_BYTES = 1 << 20
"""Bytes that are read, checksummed and written at once. A block stays in the cache of a core, which saves memory traffic."""
SMALL_BYTES = 1 << 18
"""An edge that is not needed for size makes no unit smaller than this."""


@dataclass(frozen=True)
class WriteUnit:
    """Rows [first, first + rows) of tensor[lead], written at byte `offset` of the file.

    `key`: the tensor's name among the file's checksums. `whole`: all rows are made together (transposed or interleaved
    tensors). Other units are filled block by block, in order.
    """

    name: str
    lead: tuple[int, ...]
    first: int
    rows: int
    dtype: str
    offset: int
    key: str
    row_bytes: int
    whole: bool

    def blocks(self) -> Iterator[WriteUnit]:
        """The unit in blocks of about BLOCK_BYTES."""
        step = self.rows if self.whole else max(1, BLOCK_BYTES // self.row_bytes)
        for skip in range(0, self.rows, step):
            rows, offset = min(step, self.rows - skip), self.offset + skip * self.row_bytes
            yield replace(self, first=self.first + skip, rows=rows, offset=offset)


@dataclass(frozen=True)
class PlannedFile:
    """One file: its header, and the units that follow the header."""

    name: str
    header: bytes
    units: tuple[WriteUnit, ...]
    num_bytes: int


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written under `key`, in the units that `parts` lists."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    name: str
    parts: tuple[tuple[tuple[int, ...], int, int], ...]
    """(lead, first row, rows) of each unit, in the order of the bytes."""
    whole: bool = False


def plan_files(
    entries: Sequence[PlannedTensor], file_bytes: int, name_of: Callable[[int, int], str], metadata: dict[str, str]
) -> list[PlannedFile]:
    """Tensors in order, in files of about `file_bytes`. A tensor larger than that has a file of its own.

    `name_of`: (file number, number of files) -> file name.
    """
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for entry in entries:
        own = prod(entry.shape) * FLOATS[entry.dtype].itemsize
        if groups[-1] and size + own > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += own
    return [_plan_file(group, name_of(number, len(groups)), metadata) for number, group in enumerate(groups)]


def _plan_file(entries: list[PlannedTensor], name: str, metadata: dict[str, str]) -> PlannedFile:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    places, position = [], 0
    for entry in entries:
        size = prod(entry.shape) * FLOATS[entry.dtype].itemsize
        header[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, position + size]}
        places.append(position)
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    units = []
    for entry, place in zip(entries, places):
        rows = sum(rows for _, _, rows in entry.parts)
        row_bytes = prod(entry.shape) * FLOATS[entry.dtype].itemsize // rows
        for lead, first, count in entry.parts:
            units.append(
                WriteUnit(entry.name, lead, first, count, entry.dtype, len(raw) + place, entry.key, row_bytes, entry.whole)
            )
            place += count * row_bytes
    return PlannedFile(name, raw, tuple(units), len(raw) + position)


def cut_rows(rows: int, row_bytes: int, edges: Iterable[int] = ()) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the units of a tensor whose rows can be written separately.

    Units hold at most UNIT_BYTES. A unit also ends at each of `edges`, unless that would make a unit smaller than SMALL_BYTES.
    """
    step = max(1, UNIT_BYTES // max(1, row_bytes))
    least = SMALL_BYTES // max(1, row_bytes)
    start = 0
    for edge in [*sorted(edges), rows]:
        if edge < rows and (edge - start <= least or rows - edge <= least):
            continue
        for first in range(start, edge, step):
            yield first, min(step, edge - first)
        start = edge
