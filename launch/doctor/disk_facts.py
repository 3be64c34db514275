"""Measures free space and speed of a folder's file system. In: a folder, the size in MiB. Out: facts as plain values.

The file is flushed to disk, and its pages are dropped from the page cache before it is read. The cache of a file server
cannot be emptied from here, so reading may still be too fast.

Torch-free.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from launch.doctor.request import NONCE

_SMALL_FILES = 16


def disk_facts(folder: Path, node: str, nonce: str, mib: int) -> dict[str, Any]:
    """Free space in GiB, speed in MiB/s, latency in ms. `error` is the system's message of the first failure.

    `nonce` is the text that the requesting host wrote into `folder`. `same` is False if this node sees another folder under
    that path.
    """
    facts: dict[str, Any] = {"path": str(folder), "error": "", "same": False}
    try:
        facts["same"] = (folder / NONCE).read_text() == nonce
        room = os.statvfs(folder)
        facts["free_gib"] = round(room.f_bavail * room.f_frsize / 2**30, 2)
        facts["total_gib"] = round(room.f_blocks * room.f_frsize / 2**30, 2)
        # Some file systems (btrfs, many network file systems) have no fixed number of inodes and report 0.
        facts["free_inodes"] = room.f_favail if room.f_files else None
        facts |= _speed(folder / f".speed-{node}-{os.getpid()}", mib) if mib else {}
        facts["small_file_ms"] = _small_file_ms(folder, node)
    except OSError as error:
        facts["error"] = f"{error.strerror or error}: {error.filename or folder}"
    return facts


def _speed(path: Path, mib: int) -> dict[str, float]:
    """Speed in MiB/s, measured with `mib` blocks of random bytes, which a compressing file system cannot shrink."""
    block = os.urandom(1 << 20)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        begin_s = time.perf_counter()
        for _ in range(mib):
            _write_all(descriptor, block)
        os.fsync(descriptor)
        written_s = time.perf_counter() - begin_s
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        begin_s = time.perf_counter()
        while os.read(descriptor, 1 << 20):
            pass
        read_s = time.perf_counter() - begin_s
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
    return {"write_mib_s": round(mib / written_s, 1), "read_mib_s": round(mib / read_s, 1)}


def _write_all(descriptor: int, block: bytes) -> None:
    """Write all of `block`. A full disk accepts part of a block before it refuses the rest."""
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


def _small_file_ms(folder: Path, node: str) -> float:
    """Median time in ms to create, close and remove an empty file. A run does this thousands of times."""
    times_s = []
    for index in range(_SMALL_FILES):
        path = folder / f".small-{node}-{os.getpid()}-{index}"
        begin_s = time.perf_counter()
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        path.unlink()
        times_s.append(time.perf_counter() - begin_s)
    return round(1e3 * statistics.median(times_s), 3)
