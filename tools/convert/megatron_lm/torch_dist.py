"""The tensors of a torch_dist checkpoint, by name and by rows, whatever ranks wrote them. No torch, no megatron-core.

In: the folder of one iteration. Its .metadata is a pickle that lists tensors, chunks and their places; in *.distcp each chunk
is a zip archive as torch.save writes it, uncompressed. Out: `TorchDist`. Only the small pickles of the archives are parsed;
numbers are read by byte range.

Torch-free.
"""

from __future__ import annotations

import io
import os
import threading
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.model.tensor_slice import TensorSlice
from tools.convert.hf_files import read_exactly
from tools.convert.megatron_lm.pickles import MALFORMED, StandIn, load, storage_dtype
from tools.convert.tensors.dtypes import FLOATS, Array

METADATA, COMMON = ".metadata", "common.pt"
_FIX = "copy the whole folder again, or name another iteration"
_SMALL_BYTES = 1 << 20
# Arguments of a run take some kilobytes, the states of its random generators some megabytes.
_COMMON_STATE, _MOST_COMMON_BYTES = "common_state", 1 << 28


@dataclass(frozen=True)
class TensorChunk:
    """A rectangular part of a tensor. Its zip archive is the bytes [start, start + length) of `file`."""

    tensor_slice: TensorSlice
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class ShardedTensor:
    """One tensor. `depth`: the number of leading dims along which every chunk has size 1.

    Chunks are grouped by their offsets in these dims.
    """

    shape: tuple[int, ...]
    depth: int
    chunks: dict[tuple[int, ...], list[TensorChunk]]


@dataclass(frozen=True)
class ChunkData:
    """The byte at which a chunk's numbers begin in its file, and their type."""

    start: int
    dtype: str


class TorchDist:
    """The tensors of one iteration. Any number of threads may read at once; they share the open files."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError: not of this format, files missing or cut, pickles that name what they should not."""
        self.folder = folder
        self.tensors, self.other = _inventory(folder)
        self._places: dict[TensorChunk, ChunkData] = {}
        self._opened: dict[str, int] = {}
        self._lock = threading.Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """Element type of the first chunk; `check` compares the others with it."""
        return self._place(next(iter(self.tensors[name].chunks.values()))[0]).dtype

    def check(self, name: str) -> list[Problem]:
        """Problems that keep a tensor from being read: missing elements, damaged chunks, mixed types. Reads headers only."""
        stored = self.tensors[name]
        held = [chunk for group in stored.chunks.values() for chunk in group]
        if sum(chunk.tensor_slice.size for chunk in held) != prod(stored.shape):
            got = sum(chunk.tensor_slice.size for chunk in held)
            return [Problem(name, got, f"its chunks must hold the {prod(stored.shape)} elements of {list(stored.shape)}", _FIX)]
        try:
            dtypes = {self._place(chunk).dtype for chunk in held}
        except DamagedFile as error:
            return [Problem(name, "damaged", str(error), _FIX)]
        if len(dtypes) != 1 or not dtypes <= FLOATS.keys():
            return [Problem(name, sorted(dtypes), "must be of one type, of " + ", ".join(FLOATS), "save it in bf16 or fp32")]
        return []

    def read_into(self, name: str, lead: tuple[int, ...], first: int, out: Array) -> None:
        """Fill `out` [rows, columns] with the rows of tensor[lead] from `first` on, in the tensor's type. Raises DamagedFile."""
        stored = self.tensors[name]
        inner = stored.shape[len(lead) + 1 :]
        wanted = TensorSlice((*lead, first, *(0 for _ in inner)), (*(1 for _ in lead), len(out), *inner))
        result = out.reshape(wanted.shape)
        filled = 0
        for chunk in _candidates(stored, wanted):
            common = chunk.tensor_slice.overlap(wanted)
            if common is None:
                continue
            strides = [prod(chunk.tensor_slice.shape[dim + 1 :]) for dim in range(len(chunk.tensor_slice.shape))]
            low = sum((a - b) * s for a, b, s in zip(common.offset, chunk.tensor_slice.offset, strides))
            mapping = sum((n - 1) * s for n, s in zip(common.shape, strides)) + 1
            place = result[common.slices_of(wanted)]
            direct = mapping == common.size and place.flags.c_contiguous
            raw = place if direct else np.empty(mapping, dtype=out.dtype)
            start = self._place(chunk).start + low * raw.itemsize
            read_exactly(self._descriptor(chunk.file), raw.reshape(-1).view(np.uint8).data, start, self.folder / chunk.file)
            if not direct:
                place[...] = np.lib.stride_tricks.as_strided(raw, common.shape, [s * raw.itemsize for s in strides])
            filled += common.size
        if filled != wanted.size:
            raise DamagedFile(f"{self.folder} holds {filled} of {wanted.size} elements of {name}[{first}:{first + len(out)}]")

    def _place(self, chunk: TensorChunk) -> ChunkData:
        if chunk not in self._places:
            window = _Window(self._descriptor(chunk.file), self.folder / chunk.file, chunk.start, chunk.length)
            self._places[chunk] = _find_numbers(window, chunk)
        return self._places[chunk]

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._opened[file]

    def close(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)
        self._opened = {}


def _candidates(stored: ShardedTensor, wanted: TensorSlice) -> list[TensorChunk]:
    """The chunks that may overlap `wanted`, found by their offsets in the leading dims of size 1."""
    if any(size != 1 for size in wanted.shape[: stored.depth]):
        return [chunk for group in stored.chunks.values() for chunk in group]
    return stored.chunks.get(wanted.offset[: stored.depth], [])


class _Window(io.RawIOBase):
    """A byte range of a file, as a file object."""

    def __init__(self, descriptor: int, path: Path, start: int, length: int) -> None:
        self.descriptor, self.path, self.start, self.length = descriptor, path, start, length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        read_exactly(self.descriptor, memoryview(buffer)[:count], self.start + self.position, self.path)
        self.position += count
        return count


def _find_numbers(window: _Window, chunk: TensorChunk) -> ChunkData:
    """Parse the zip archive of a chunk. Raises DamagedFile, and ConfigError when its pickle is refused."""
    what = f"{window.path}: the chunk at byte {window.start}"
    try:
        with zipfile.ZipFile(io.BufferedReader(window)) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            head = pickled.removesuffix("data.pkl")
            if archive.getinfo(pickled).file_size > _SMALL_BYTES or archive.read(f"{head}byteorder") != b"little":
                raise DamagedFile(f"{what} is not as torch.save writes a tensor here")
            storage, first, size, strides = _tensor_args(load(archive.read(pickled), what), what)
            numbers = archive.getinfo(f"{head}data/{storage[2]}")
        if numbers.compress_type != zipfile.ZIP_STORED:
            raise DamagedFile(f"{what} is compressed")
        name_length, extra_length = _local_lengths(window, numbers.header_offset)
    except (zipfile.BadZipFile, *MALFORMED) as error:
        raise DamagedFile(f"{what} is no tensor of torch.save: {error}") from error
    dtype = storage_dtype(storage[1])
    plain = [prod(size[dim + 1 :]) for dim in range(len(size))]
    contiguous = all(n == 1 or s == p for n, s, p in zip(size, strides, plain))
    if dtype is None or size != chunk.tensor_slice.shape or not contiguous:
        raise DamagedFile(
            f"{what} holds {dtype or storage[1]} {list(size)}, strides {list(strides)}; {list(chunk.tensor_slice.shape)} is said"
        )
    itemsize = {**{name: kind.itemsize for name, kind in FLOATS.items()}, "I64": 8, "I32": 4, "U8": 1}[dtype]
    if numbers.file_size < (first + prod(size)) * itemsize:
        raise DamagedFile(f"{what} holds {numbers.file_size} bytes for {list(size)} of {dtype}")
    start = window.start + numbers.header_offset + 30 + name_length + extra_length + first * itemsize
    if start + prod(size) * itemsize > window.start + window.length:
        raise DamagedFile(f"{what} ends before its numbers")
    return ChunkData(start, dtype)


def _tensor_args(value: Any, what: str) -> tuple[tuple[Any, ...], int, tuple[int, ...], tuple[int, ...]]:
    """(storage, first element, size, strides) of a pickled tensor or parameter."""
    if getattr(value, "origin", "") == "torch._utils._rebuild_parameter":
        value = value.args[0]
    if getattr(value, "origin", "") != "torch._utils._rebuild_tensor_v2":
        raise DamagedFile(f"{what} holds no plain tensor but {getattr(value, 'origin', type(value).__name__)}")
    storage, first, size, strides = value.args[:4]
    if not isinstance(storage, tuple) or storage[0] != "storage" or not isinstance(first, int):
        raise DamagedFile(f"{what} holds no storage")
    return storage, first, tuple(map(int, size)), tuple(map(int, strides))


def _local_lengths(window: _Window, header_offset: int) -> tuple[int, int]:
    """Lengths of the name and of the extra field in a zip entry's local header. The central directory's may differ."""
    window.seek(header_offset)
    head = bytearray(30)
    if window.readinto(head) != 30 or head[:4] != b"PK\x03\x04":
        raise DamagedFile(f"{window.path} has no zip entry at byte {window.start + header_offset}")
    return int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")


def _inventory(folder: Path) -> tuple[dict[str, ShardedTensor], list[str]]:
    """(tensors by name, names of other values). Raises ConfigError."""
    path = folder / METADATA
    try:
        metadata = load(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ConfigError(Problem(str(path), "missing", "a torch_dist checkpoint has it", _FIX)) from error
    try:
        places = {(index.fqn, tuple(getattr(index, "offset", None) or ())): info for index, info in metadata.storage_data.items()}
        tensors, other = {}, []
        for name, value in metadata.state_dict_metadata.items():
            if value.origin.endswith(".TensorStorageMetadata"):
                tensors[name] = _stored(name, value, places)
            else:
                other.append(name)
    except MALFORMED as error:
        rule = f"must list tensors and their chunks: {type(error).__name__} {error}"
        raise ConfigError(Problem(str(path), "refused", rule, _FIX)) from error
    problems = _check_files(folder, tensors)
    if problems:
        raise ConfigError(problems)
    return tensors, other


def common_state(folder: Path) -> bytes | None:
    """What torch.save wrote of the values that are no tensors; None: the folder holds none.

    It is the file common.pt, or, from Megatron-Core 0.19 on, a byte range of a .distcp file. Raises OSError, and ConfigError.
    """
    if (folder / COMMON).exists():
        return (folder / COMMON).read_bytes()
    path = folder / METADATA
    if not path.exists():
        return None
    try:
        places = load(path.read_bytes(), str(path)).storage_data
        found = [info for index, info in places.items() if str(index.fqn).startswith(_COMMON_STATE)]
        if not found:
            return None
        (info,) = found
        start, length, name = int(info.offset), int(info.length), str(info.relative_path)
        if Path(name).name != name or start < 0 or not 0 < length <= _MOST_COMMON_BYTES:
            raise ValueError(f"{length} bytes at {start} of {name}")
    except MALFORMED as error:
        rule = f"must say where {_COMMON_STATE} lies: {type(error).__name__} {error}"
        raise ConfigError(Problem(str(path), "refused", rule, _FIX)) from error
    with open(folder / name, "rb") as file:
        file.seek(start)
        return file.read(length)


def _stored(name: str, value: StandIn, places: dict[tuple[str, tuple[int, ...]], Any]) -> ShardedTensor:
    size = tuple(map(int, value.size))  # type: ignore[attr-defined]
    chunks = []
    for part in value.chunks:  # type: ignore[attr-defined]
        slice_ = TensorSlice(tuple(map(int, part.offsets)), tuple(map(int, part.sizes)))
        if any(low < 0 or n < 1 or low + n > whole for low, n, whole in zip(slice_.offset, slice_.shape, size, strict=True)):
            raise ValueError(f"{name}: a chunk at {slice_.offset} of {slice_.shape} lies outside {size}")
        info = places[(name, slice_.offset)]
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{name} is compressed or encrypted ({info.transform_descriptors})")
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{name} lies outside its folder: {info.relative_path}")
        chunks.append(TensorChunk(slice_, info.relative_path, int(info.offset), int(info.length)))
    depth = 0
    while depth < len(size) - 1 and all(chunk.tensor_slice.shape[depth] == 1 for chunk in chunks):
        depth += 1
    groups: dict[tuple[int, ...], list[TensorChunk]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.tensor_slice.offset[:depth], []).append(chunk)
    return ShardedTensor(size, depth, groups)


def _check_files(folder: Path, tensors: dict[str, ShardedTensor]) -> list[Problem]:
    """A problem for each file that is missing or shorter than its chunks."""
    needed: dict[str, int] = {}
    for stored in tensors.values():
        for chunk in (chunk for group in stored.chunks.values() for chunk in group):
            needed[chunk.file] = max(needed.get(chunk.file, 0), chunk.start + chunk.length)
    problems = []
    for file, length in sorted(needed.items()):
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < length:
            got = "missing" if size is None else f"{size} bytes long"
            problems.append(Problem(str(path), got, f"{METADATA} says that it holds {length} bytes", _FIX))
    return problems
