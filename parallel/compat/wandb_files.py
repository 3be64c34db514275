"""Which steps are in W&B's own files. In: a folder of W&B runs. Out: the steps that are truly on the disk.

A `.wandb` file is a LevelDB log: a 7-byte header, then 32 KiB blocks of chunks (crc u32, length u16, type u8, data; type
1 whole, 2 first, 3 middle, 4 last), each record one protobuf. A killed writer leaves a cut tail; reading stops there.

Torch-free.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = b":W&B"
_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_CHUNK_BYTES = 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class SegmentReader:
    """Reads one `.wandb` file as it grows: `poll` returns the history rows that came since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = _HEADER_BYTES

    def poll(self) -> list[dict[str, Any]]:
        """New whole rows. A missing, foreign or damaged file has none, or none past the damage."""
        try:
            with open(self.path, "rb") as file:
                if file.read(4) != _HEADER:
                    return []
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        rows = []
        start = self._offset
        for end, record in _records(data, start):
            row = _history_row(record)
            if row is not None:
                rows.append(row)
            self._offset = start + end
        return rows


def steps_in(path: Path) -> set[int]:
    """The values of `step` in one `.wandb` file."""
    return {int(row["step"]) for row in SegmentReader(path).poll() if "step" in row}


def is_empty(path: Path) -> bool:
    """Without one whole record: its writer was killed before it first wrote."""
    return next(_records(path.read_bytes()[_HEADER_BYTES:], _HEADER_BYTES), None) is None


def _records(data: bytes, file_offset: int) -> Iterator[tuple[int, bytes]]:
    """(end within `data`, payload) of each whole record; `file_offset`, where `data` starts, must be a record's start."""
    position, payload = 0, b""
    while True:
        left_in_block = _BLOCK_BYTES - (file_offset + position) % _BLOCK_BYTES
        if left_in_block < _CHUNK_BYTES:
            position += left_in_block
            continue
        if position + _CHUNK_BYTES > len(data):
            return
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0 and length == 0:
            # Padding to the block's end, or zeroes after a power loss: both hold nothing.
            position += left_in_block
            continue
        chunk = data[position + _CHUNK_BYTES : position + _CHUNK_BYTES + length]
        if len(chunk) < length or kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
            return
        position += _CHUNK_BYTES + length
        payload = chunk if kind in (_WHOLE, _FIRST) else payload + chunk
        if kind in (_WHOLE, _LAST):
            yield position, payload


def _history_row(record: bytes) -> dict[str, Any] | None:
    """The logged values when the record is a history row, else None."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415  only the copying process has wandb at hand
    from wandb.proto import wandb_internal_pb2 as protocol  # noqa: PLC0415  the same

    parsed = protocol.Record()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        parsed.ParseFromString(record)
    except DecodeError:
        return None
    if parsed.WhichOneof("record_type") != "history":
        return None
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in parsed.history.item}
