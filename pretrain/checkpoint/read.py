"""Reading a checkpoint into any layout. Each state slice of a rank is filled from the stored slices that overlap it.

In: a folder. Out: values in the tensors of `StateSlice`s. Every rank reads on its own, without a process group.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from pretrain.checkpoint.manifest import Manifest, StoredSlice, read_index, read_manifest, slice_key
from pretrain.checkpoint.tensor_file import DamagedFile, TensorEntry, UnfitFile, read_bytes, read_header
from pretrain.engine.base import StateSlice
from pretrain.model.tensor_slice import split_range

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


class CheckpointReader:
    """One complete checkpoint.

    It keeps the index and the headers of the files that were read. One stored slice is in memory at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self._exact: dict[str, StoredSlice] = {}
        self._by_tensor: dict[tuple[str, str], list[StoredSlice]] = {}
        for stored in read_index(folder):
            self._exact[stored.key] = stored
            self._by_tensor.setdefault((stored.kind, stored.name), []).append(stored)

    def has(self, kind: str) -> bool:
        return kind in self.manifest.kinds

    def fill(self, state_slices: Iterable[StateSlice]) -> None:
        """Write the `data` of every state slice in place.

        Raises DamagedFile, and UnfitFile when the whole checkpoint lacks a part of a state slice.
        """
        for state_slice in state_slices:
            stored = self._exact.get(
                slice_key(state_slice.kind, state_slice.name, state_slice.tensor_slice, state_slice.start, state_slice.stop)
            )
            if stored is not None:
                state_slice.data.copy_(self.read(stored))
            else:
                self._assemble(state_slice)

    def read(self, stored: StoredSlice) -> torch.Tensor:
        """One stored slice: [stop - start]. Raises DamagedFile, also when its CRC-32 is wrong."""
        header = self._headers.get(stored.file)
        if header is None:
            header = self._headers[stored.file] = read_header(self.folder / stored.file)
        if stored.key not in header:
            raise DamagedFile(f"{self.folder / stored.file} lacks {stored.key}")
        entry = header[stored.key]
        raw = read_bytes(self.folder / stored.file, entry, stored.crc32)
        return torch.from_numpy(raw).view(DTYPES[entry.dtype])

    def _assemble(self, state_slice: StateSlice) -> None:
        """Fill a state slice from stored slices that were cut in another layout."""
        filled = 0
        for stored in self._by_tensor.get((state_slice.kind, state_slice.name), []):
            if stored.tensor_slice.overlap(state_slice.tensor_slice) is None:
                continue
            data = None
            for position, wanted in split_range(state_slice.tensor_slice, state_slice.start, state_slice.stop):
                target = state_slice.data[position - state_slice.start : position - state_slice.start + wanted.size].view(
                    wanted.shape
                )
                for at, held in split_range(stored.tensor_slice, stored.start, stored.stop):
                    common = held.overlap(wanted)
                    if common is None:
                        continue
                    data = self.read(stored) if data is None else data
                    source = data[at - stored.start : at - stored.start + held.size].view(held.shape)
                    target[common.slices_of(wanted)] = source[common.slices_of(held)].to(target.dtype)
                    filled += common.size
        if filled != state_slice.stop - state_slice.start:
            raise UnfitFile(
                f"{self.folder} holds {filled} of the {state_slice.stop - state_slice.start} elements of "
                f"{slice_key(state_slice.kind, state_slice.name, state_slice.tensor_slice, state_slice.start, state_slice.stop)}"
            )
