"""Writing many tensor files: planned to the byte, filled by threads, each complete or absent, gone on with after a kill. [p]

In: planned files (header, units with their place) and what fills a unit. Out: a folder OUT.partial that becomes OUT.
A file is written under another name, synced, renamed, and only then noted in FILE.done (its sums): a conversion that is
started again skips the noted ones. Several processes share the work: each takes the files of its share, the last finishes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from configs.files import read_json, storage_problem, sync_folder, write_atomically
from tools.convert.dtypes import FLOATS, Array

UNIT_BYTES = 32 << 20
"""Largest part of a tensor that is in memory at once, where rows can be cut."""


@dataclass(frozen=True)
class Unit:
    """Rows [first, first + rows) of tensor[lead], written at byte `offset` of its file. `key`: its name in the file's sums."""

    name: str
    lead: tuple[int, ...]
    first: int
    rows: int
    dtype: str
    offset: int
    key: str


@dataclass(frozen=True)
class OutFile:
    """One file: its header and what follows it."""

    name: str
    header: bytes
    units: tuple[Unit, ...]
    num_bytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor to be written under `key`, in one piece or, with `cut` rows at a time, in several units."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    name: str
    parts: tuple[tuple[tuple[int, ...], int, int], ...]
    """(lead, first row, rows) of each unit, in the order of the bytes."""


def plan_files(
    entries: Sequence[Entry], file_bytes: int, name_of: Callable[[int, int], str], metadata: dict[str, str]
) -> list[OutFile]:
    """Entries in order, files of about `file_bytes` (a larger tensor has its own). `name_of`: (number, count) -> name."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        own = prod(entry.shape) * FLOATS[entry.dtype].itemsize
        if groups[-1] and size + own > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += own
    return [_plan_file(group, name_of(number, len(groups)), metadata) for number, group in enumerate(groups)]


def _plan_file(entries: list[Entry], name: str, metadata: dict[str, str]) -> OutFile:
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
            units.append(Unit(entry.name, lead, first, count, entry.dtype, len(raw) + place, entry.key))
            place += count * row_bytes
    return OutFile(name, raw, tuple(units), len(raw) + position)


def cut_rows(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, rows) of the units of a tensor that may be cut."""
    step = max(1, UNIT_BYTES // max(1, row_bytes))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


@dataclass(frozen=True)
class Share:
    """This process takes the files whose number is `index` modulo `count`."""

    index: int = 0
    count: int = 1


class Workplace:
    """The folder OUT.partial of one conversion."""

    def __init__(self, out: Path, files: Sequence[OutFile], identity: Any, force: bool, summed: bool = True) -> None:
        """`summed`: each unit's CRC-32 is wanted. Raises ConfigError: OUT exists, is begun otherwise, no room."""
        self.out, self.files, self.summed = out, files, summed
        self.partial = out.with_name(out.name + ".partial")
        self.force = force
        headers = [hashlib.sha256(file.header).hexdigest() for file in files]
        self.plan = hashlib.sha256(json.dumps([identity, headers], sort_keys=True, default=str).encode()).hexdigest()
        if out.exists() and not force:
            rule = "must not exist: nothing is overwritten without a word"
            raise ConfigError(Problem("OUT", str(out), rule, "name another folder, or add --force"))
        try:
            self._open()
        except OSError as error:
            raise ConfigError(storage_problem("OUT", self.partial, error)) from error

    def _open(self) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        with self._locked():
            begun = read_json(self.partial / "plan.json")
            if begun is not None and begun != {"plan": self.plan}:
                if not self.force:
                    rule = "holds another conversion that was begun and not finished (other source, options or version)"
                    raise ConfigError(Problem("OUT", str(self.partial), rule, "delete that folder, or add --force"))
                for path in self.partial.iterdir():
                    if path.name != ".lock":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                begun = None
            if begun is None:
                write_atomically(self.partial / "plan.json", json.dumps({"plan": self.plan}))
        missing = sum(file.num_bytes for file in self.files if self.sums_of(file) is None)
        free = shutil.disk_usage(self.partial).free
        if missing > free:
            rule = f"the disk must have room: {missing / 2**30:.2f} GiB are to be written, {free / 2**30:.2f} GiB are free"
            raise ConfigError(Problem("OUT", str(self.out), rule, "free some space, or name another folder"))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.partial / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def sums_of(self, file: OutFile) -> dict[str, int] | None:
        """CRC-32 by key of a file that is complete, else None."""
        done = read_json(self.partial / f"{file.name}.done")
        path = self.partial / file.name
        whole = isinstance(done, dict) and path.exists() and path.stat().st_size == file.num_bytes
        return done if whole else None

    def write(self, share: Share, workers: int, fill: Callable[[Unit], Array]) -> int:
        """Write this share's files; returns the number of bytes written. Raises ConfigError when the disk refuses."""
        written = 0
        mine = [file for number, file in enumerate(self.files) if number % share.count == share.index]
        with ThreadPoolExecutor(workers) as pool:
            for number, file in enumerate(mine):
                if self.sums_of(file) is None:
                    try:
                        self._write_file(file, pool, fill)
                    except OSError as error:
                        problem = storage_problem("OUT", self.partial / file.name, error)
                        fix = f"{problem.fix}; the same command then goes on: complete files are kept in {self.partial}"
                        raise ConfigError(Problem(problem.path, problem.got, problem.rule, fix)) from error
                    written += file.num_bytes
                print(f"{number + 1} of {len(mine)} files: {file.name} ({file.num_bytes / 2**20:.0f} MiB)", file=sys.stderr)
        return written

    def _write_file(self, file: OutFile, pool: ThreadPoolExecutor, fill: Callable[[Unit], Array]) -> None:
        beside = self.partial / f".{file.name}.{os.getpid()}.tmp"
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(descriptor, 0, file.num_bytes)
            _write_at(descriptor, memoryview(file.header), 0)

            def work(unit: Unit) -> tuple[str, int]:
                values = fill(unit)
                raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
                _write_at(descriptor, raw, unit.offset)
                return unit.key, zlib.crc32(raw) if self.summed else 0

            sums: dict[str, int] = {}
            for key, crc in pool.map(work, file.units):
                # A tensor of several units has no sum of its own; only whole pieces are looked up later.
                sums[key] = crc
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            beside.unlink(missing_ok=True)
            raise
        os.close(descriptor)
        os.replace(beside, self.partial / file.name)
        sync_folder(self.partial)
        write_atomically(self.partial / f"{file.name}.done", json.dumps(sums))

    def finish(self, complete: Callable[[Path, dict[str, dict[str, int]]], None]) -> bool:
        """When every file is there, `complete(folder, sums by file)` adds the rest and the folder gets its name.

        False: others still write.
        """
        if self.out.exists() and not self.partial.exists():
            return True
        try:
            with self._locked():
                sums = {file.name: self.sums_of(file) for file in self.files}
                if not self.partial.exists() or any(value is None for value in sums.values()):
                    return self.out.exists() and not self.partial.exists()
                complete(self.partial, {name: value for name, value in sums.items() if value is not None})
                for path in [*self.partial.glob("*.done"), *self.partial.glob(".*.tmp"), self.partial / "plan.json"]:
                    path.unlink(missing_ok=True)
                sync_folder(self.partial)
                self._publish()
        except OSError as error:
            raise ConfigError(storage_problem("OUT", self.out, error)) from error
        return True

    def _publish(self) -> None:
        replaced = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            self.out.rename(replaced)
        (self.partial / ".lock").unlink(missing_ok=True)
        self.partial.rename(self.out)
        sync_folder(self.out.parent)
        if replaced.exists():
            shutil.rmtree(replaced)


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    position = 0
    while position < len(view):
        position += os.pwrite(descriptor, view[position:], offset + position)
