"""Writes PREFIX.bin, PREFIX.idx and PREFIX.meta.json. The pair has the bytes that Megatron's IndexedDatasetBuilder writes.

Everything goes to `.partial` files in the same folder, which `finish` syncs and renames. An interrupted or failed conversion
leaves no final file and keeps the former ones. Memory: 4 bytes per document.

Torch-free.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from configs.errors import ConfigError, Problem
from pretrain.data.indexed import HEADER, MAGIC, VERSION, bin_path, dtype_code, file_problem, idx_path, meta_path
from pretrain.run.files import write_atomically

BLOCK = 1 << 20


class DatasetWriter:
    """A context manager. Documents are added in order, one sequence each. Raises ConfigError when a file can't be written."""

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.lengths = array("i")
        self.num_tokens = 0
        self.finished = False
        self.partial = bin_path(prefix + ".partial")
        self.partial_idx = idx_path(prefix + ".partial")
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            if not self.partial.name.removesuffix(".partial.bin") or Path(prefix).is_dir():
                fix = f"name the files, e.g. {prefix.rstrip('/')}/train"
                raise ConfigError(Problem("--out", prefix, "must be a prefix of files, not a folder", fix))
            self.file: IO[bytes] = open(self.partial, "ab")  # noqa: SIM115  (closed by __exit__; truncated once it is locked)
        except OSError as error:
            raise ConfigError(file_problem(error, prefix, "--out")) from error
        self._lock()

    def _lock(self) -> None:
        """Allow one writer per prefix. The lock ends with its process, however the process ends."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former holder may have renamed this very file into place between our open and our lock.
            ours = self.partial.exists() and os.path.samestat(os.fstat(self.file.fileno()), self.partial.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            self.file.close()
            rule = "another process is writing this prefix"
            raise ConfigError(Problem("--out", self.prefix, rule, "wait for it, or give another prefix"))
        self.file.truncate(0)

    def add(self, tokens: bytes, lengths: bytes) -> None:
        """Add documents: tokens in the writer's dtype, lengths in tokens as int32. The lengths must sum to the tokens."""
        self.lengths.frombytes(lengths)
        self.num_tokens += len(tokens) // self.dtype.itemsize
        try:
            self.file.write(tokens)
        except OSError as error:
            raise ConfigError(file_problem(error, self.partial, "--out")) from error

    def finish(self, meta: dict[str, Any]) -> None:
        """Sync and rename the three files. A reader never finds a new .idx beside an old .bin."""
        stated = int(np.frombuffer(self.lengths, np.int32).sum(dtype=np.int64)) if self.lengths else 0
        assert stated == self.num_tokens, f"lengths add up to {stated}, {self.num_tokens} tokens were written"
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            with open(self.partial_idx, "wb") as file:
                file.writelines(self._index())
                file.flush()
                os.fsync(file.fileno())
            for former in (meta_path(self.prefix), idx_path(self.prefix)):
                former.unlink(missing_ok=True)
            os.replace(self.partial, bin_path(self.prefix))
            os.replace(self.partial_idx, idx_path(self.prefix))
            self.finished = True
            write_atomically(meta_path(self.prefix), json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(file_problem(error, self.prefix, "--out")) from error

    def _index(self) -> Iterator[bytes]:
        """The bytes of the .idx, in blocks."""
        lengths = np.frombuffer(self.lengths, np.int32) if self.lengths else np.zeros(0, np.int32)
        yield HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), len(lengths), len(lengths) + 1)
        yield lengths.tobytes()
        offset = 0
        for first in range(0, len(lengths), BLOCK):
            ends = offset + np.cumsum(lengths[first : first + BLOCK], dtype=np.int64)
            yield (np.concatenate(([offset], ends[:-1])) * self.dtype.itemsize).astype(np.int64).tobytes()
            offset = int(ends[-1])
        for first in range(0, len(lengths) + 1, BLOCK):
            yield np.arange(first, min(first + BLOCK, len(lengths) + 1), dtype=np.int64).tobytes()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.finished:  # afterwards the names may belong to another writer; until then the lock excludes others
            self.partial_idx.unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)
        # Closing flushes again. After a failed write it would fail, too, and hide the first error.
        with contextlib.suppress(*([OSError] if error else [])):
            self.file.close()
