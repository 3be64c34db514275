"""The output of a conversion: many tensor files, planned to the byte, filled by threads, each complete or absent.

In: planned files (header, units with their place), and a function that fills a unit. Out: a folder OUT.partial that becomes
OUT. A file is written under a temporary name, synced, renamed, and then recorded in FILE.done with its checksums. A conversion
that is started again skips the recorded files. Several processes can share the work: each writes the files of its share and
marks the share as written; the last one completes the folder.

Torch-free.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, Problem
from pretrain.run.files import read_json, storage_problem, sync_folder, write_atomically
from pretrain.run.folder import COMPLETE
from tools.convert.file_plan import PlannedFile, WriteUnit
from tools.convert.tensors.dtypes import FLOATS, Array

_OURS = (COMPLETE, "config.json")
Fill = Callable[[WriteUnit, Array], None]
"""Puts the rows of a unit (or of a block of one) into an array [rows, columns] of the unit's type."""


@dataclass(frozen=True)
class WorkShare:
    """The share of one process: the files whose number modulo `count` is `index`."""

    index: int = 0
    count: int = 1


def check_output_path(out: Path, source: Path, force: bool) -> Path:
    """`out` as an absolute path. Raises ConfigError when it exists, or when writing it would change the source."""
    # Symbolic links are followed: the folder itself is replaced, not the link. realpath, since resolve() fails on loops.
    place, read = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    fix = "name a new folder elsewhere"
    if place == read or place in read.parents:
        raise ConfigError(Problem("OUT", str(out), f"must differ from the source {source}", fix))
    if read in place.parents:
        raise ConfigError(Problem("OUT", str(out), f"must lie outside of the source {source}", fix))
    if not os.path.lexists(place):
        return place
    if not force:
        rule = "must not exist: existing files are replaced only with --force"
        raise ConfigError(Problem("OUT", str(out), rule, "name another folder, or add --force"))
    # --force on a wrong path must not delete a person's files.
    if not place.is_dir() or (any(place.iterdir()) and not any((place / name).is_file() for name in _OURS)):
        rule = f"--force replaces a converted model only: an empty folder, or one with {' or '.join(_OURS)}"
        raise ConfigError(Problem("OUT", str(out), rule, fix))
    return place


class OutputFolder:
    """The folder OUT.partial of one conversion, which becomes OUT."""

    def __init__(self, out: Path, files: Sequence[PlannedFile], identity: Any, force: bool, summed: bool = True) -> None:
        """`out`: from `check_output_path`. `summed`: compute the CRC-32 of each unit.

        Raises ConfigError when another conversion was begun there, or when the disk lacks the space.
        """
        self.out, self.files, self.summed = out, files, summed
        self.partial = out.with_name(out.name + ".partial")
        self.force = force
        self._descriptors: dict[str, int] = {}
        headers = [hashlib.sha256(file.header).hexdigest() for file in files]
        self.plan = hashlib.sha256(json.dumps([identity, headers], sort_keys=True, default=str).encode()).hexdigest()
        is_new = False
        try:
            is_new = not self.partial.exists()
            self.partial.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise ConfigError(storage_problem("OUT", self.partial, error)) from error
        except ConfigError:
            if is_new:
                shutil.rmtree(self.partial)
            raise

    def _open(self) -> None:
        with self._locked():
            begun = read_json(self.partial / "plan.json")
            if begun is not None and begun != {"plan": self.plan}:
                if not self.force:
                    rule = "must not hold another unfinished conversion (other source, options or version)"
                    raise ConfigError(Problem("OUT", str(self.partial), rule, "delete that folder, or add --force"))
                for path in self.partial.iterdir():
                    if path.name != ".lock":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                begun = None
            if begun is None:
                write_atomically(self.partial / "plan.json", json.dumps({"plan": self.plan}))
            self._remove_abandoned()
        missing = sum(file.num_bytes for file in self.files if self.sums_of(file) is None)
        free = shutil.disk_usage(self.partial).free
        if missing > free:
            rule = f"the disk must have {missing / 2**30:.2f} GiB free, it has {free / 2**30:.2f} GiB"
            raise ConfigError(Problem("OUT", str(self.out), rule, "free some space, or name another folder"))

    def _remove_abandoned(self) -> None:
        """Delete temporary files that a killed process left. A living one holds a lock on its own."""
        names = {file.name for file in self.files}
        for path in self.partial.glob(".*.tmp"):
            match = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
            if match is None or match[1] not in names:
                continue
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.partial / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def sums_of(self, file: PlannedFile) -> dict[str, int] | None:
        """CRC-32 by key of a complete file, else None."""
        done = read_json(self.partial / f"{file.name}.done")
        path = self.partial / file.name
        whole = isinstance(done, dict) and path.exists() and path.stat().st_size == file.num_bytes
        return done if whole else None

    def write(self, share: WorkShare, workers: int, fill: Fill, verify_pending: Callable[[], None] = lambda: None) -> int:
        """Write this share's files; returns the number of bytes written. Raises ConfigError when the disk refuses.

        `verify_pending` is called when a file is filled, before the file counts. It raises DamagedFile when what was read is
        damaged.
        """
        written = 0
        mine = [file for number, file in enumerate(self.files) if number % share.count == share.index]
        # One file is synced while the next one is filled.
        with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as sealer:
            sealing: list[Future[None]] = []
            for number, file in enumerate(mine):
                try:
                    if self.sums_of(file) is None:
                        sums = self._write_file(file, pool, fill, verify_pending)
                        _wait(sealing)
                        sealing = [sealer.submit(self._seal, file, sums)]
                        written += file.num_bytes
                    if number + 1 == len(mine):
                        _wait(sealing)
                except OSError as error:
                    self._discard_unsealed()
                    problem = storage_problem("OUT", self.partial / file.name, error)
                    fix = f"{problem.fix}; the same command then continues: complete files are kept in {self.partial}"
                    raise ConfigError(Problem(problem.path, problem.got, problem.rule, fix)) from error
                print(f"{number + 1} of {len(mine)} files: {file.name} ({file.num_bytes / 2**20:.0f} MiB)", file=sys.stderr)
        try:
            write_atomically(self._through(share.index, share.count), "")
        except FileNotFoundError:
            # Another process with the same share was faster and has already renamed the folder.
            if not self.out.exists():
                raise
        except OSError as error:
            raise ConfigError(storage_problem("OUT", self.partial, error)) from error
        return written

    def _discard_unsealed(self) -> None:
        """Delete files that are filled and won't be sealed, since sealing an earlier one failed."""
        for file in self.files:
            if (descriptor := self._descriptors.pop(file.name, None)) is not None:
                self._beside(file).unlink(missing_ok=True)
                os.close(descriptor)

    def _through(self, index: int, count: int) -> Path:
        """The marker file of a share that is written."""
        return self.partial / f"share_{index}_of_{count}.through"

    def _beside(self, file: PlannedFile) -> Path:
        return self.partial / f".{file.name}.{os.getpid()}.tmp"

    def _write_file(
        self, file: PlannedFile, pool: ThreadPoolExecutor, fill: Fill, verify_pending: Callable[[], None]
    ) -> dict[str, int]:
        """Fill the file under a temporary name. Returns CRC-32 by key."""
        beside, buffers = self._beside(file), threading.local()
        # The file is locked until `_seal` has renamed it: an unlocked one counts as abandoned.
        with self._locked():
            descriptor = self._descriptors[file.name] = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)

        def work(unit: WriteUnit) -> tuple[str, int]:
            total = 0
            for block in unit.blocks():
                # One buffer per thread: the page faults of fresh memory would cost more than the copy.
                values = _buffer(buffers, block.rows * block.row_bytes)
                fill(block, values.view(FLOATS[block.dtype]).reshape(block.rows, -1))
                _write_at(descriptor, values.data, block.offset)
                total = zlib.crc32(values.data, total) if self.summed else 0
            return unit.key, total

        try:
            os.truncate(descriptor, file.num_bytes)
            _write_at(descriptor, memoryview(file.header), 0)
            # A tensor of several units has no checksum. Only slices of one unit are looked up later.
            sums = dict(pool.map(work, file.units))
            verify_pending()
        except BaseException:
            beside.unlink(missing_ok=True)
            os.close(self._descriptors.pop(file.name))
            raise
        return sums

    def _seal(self, file: PlannedFile, sums: dict[str, int]) -> None:
        """Sync a filled file, give it its final name, and record its checksums."""
        beside = self._beside(file)
        descriptor = self._descriptors.pop(file.name)
        try:
            os.fsync(descriptor)
            os.replace(beside, self.partial / file.name)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        sync_folder(self.partial)
        write_atomically(self.partial / f"{file.name}.done", json.dumps(sums))

    def finish(self, share: WorkShare, complete: Callable[[Path, dict[str, dict[str, int]]], None]) -> bool:
        """Complete the folder when every share is written: call `complete(folder, sums by file)`, then rename the folder.

        Returns False while other shares are still being written.
        """
        if self.out.exists() and not self.partial.exists():
            return True
        try:
            with self._locked():
                sums = {file.name: self.sums_of(file) for file in self.files}
                through = all(self._through(index, share.count).exists() for index in range(share.count))
                if not through or any(value is None for value in sums.values()):
                    return self.out.exists() and not self.partial.exists()
                complete(self.partial, {name: value for name, value in sums.items() if value is not None})
                marks = [path for kind in ("*.done", "*.through", ".*.tmp") for path in self.partial.glob(kind)]
                for path in [*marks, self.partial / "plan.json"]:
                    path.unlink(missing_ok=True)
                sync_folder(self.partial)
                self._publish()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.out.exists() and not self.partial.exists():
                return True
            raise ConfigError(storage_problem("OUT", self.out, error)) from error
        return True

    def _publish(self) -> None:
        replaced = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            self.out.rename(replaced)
        self.partial.rename(self.out)
        # Not before the rename: another process would create the lock file again.
        (self.out / ".lock").unlink(missing_ok=True)
        sync_folder(self.out.parent)
        if replaced.exists():
            shutil.rmtree(replaced)


def _wait(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()


def _buffer(buffers: threading.local, num_bytes: int) -> NDArray[np.uint8]:
    """The first `num_bytes` bytes of this thread's buffer, which grows to the largest block."""
    held: NDArray[np.uint8] | None = getattr(buffers, "held", None)
    if held is None or len(held) < num_bytes:
        held = buffers.held = np.empty(num_bytes, dtype=np.uint8)
    return held[:num_bytes]


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    position = 0
    while position < len(view):
        position += os.pwrite(descriptor, view[position:], offset + position)
