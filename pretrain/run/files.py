"""Files that a crash can't leave half-written. In: a path and its content. Out: the old file or the new one, never a mixture.

Two kinds: whole files (written beside, renamed) and JSON lines (appended; a torn last line is mended at the next open).

Torch-free.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import Problem

_TAIL_BYTES = 1 << 16

_RULES = {
    errno.ENOSPC: ("the disk must have room", "free some space, or choose another folder"),
    errno.EDQUOT: ("the disk quota must have room", "free some space, or choose another folder"),
    errno.EFBIG: ("the file size limit must leave room", "raise the limit (ulimit -f), or choose another folder"),
    errno.EROFS: ("the file system must be writable, it is mounted read-only", "choose another folder"),
    errno.EACCES: ("must be readable and writable by this user", "change its permissions, or choose another folder"),
    errno.EPERM: ("must be readable and writable by this user", "change its permissions, or choose another folder"),
    errno.ENOTDIR: ("every part of the path above must be a folder", "choose another folder"),
    errno.ENAMETOOLONG: ("the path must be short enough for the file system", "choose a shorter path"),
}


def storage_problem(key: str, path: str | Path, error: OSError) -> Problem:
    """What a failed write or read means for the user; `key` is the config key that chose the place."""
    rule, fix = _RULES.get(error.errno or 0, ("the file system must accept the file", "choose another folder"))
    return Problem(key, str(path), f"{rule} ({error.strerror or error}: {error.filename or path})", fix)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, data: bytes | str, durable: bool = True) -> None:
    """Write beside `path`, fsync, rename. Raises OSError; the old content then still stands and nothing lies beside it.

    `durable` False: without the fsync, for what is written again in seconds; readers still see the old or the new one.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = data.encode() if isinstance(data, str) else data
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically. NaN and infinity are refused: they aren't JSON."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any | None:
    """The file's value; None when it isn't there or isn't JSON (a file of another program, or of a crash)."""
    try:
        return json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One JSON object, or None when the line is something else."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def iterate_lines(path: str | Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each complete line with its newline, and its object (None: not a JSON object). A torn last line is left out."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line, parse_line(line)


def append_line(descriptor: int, row: dict[str, Any]) -> None:
    """One line in one write, so that only a full disk or a kill in the middle can tear it. Raises OSError."""
    line = json.dumps(row, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
    written = os.write(descriptor, line)
    if written != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mend_torn_line(path: str | Path) -> int:
    """Finish or cut a last line without its newline; returns the bytes cut (0: nothing was torn, or nothing lost).

    A whole JSON object that only misses its newline is kept: an object can't be complete and torn at once.
    """
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "r+b") as file:
        torn = _last_piece(file)
        if not torn:
            return 0
        if parse_line(torn) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
            return 0
        file.truncate(file.seek(0, os.SEEK_END) - len(torn))
    return len(torn)


def last_row(path: str | Path) -> dict[str, Any] | None:
    """The last complete JSON object of a JSON lines file, reading only its end. None: there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    rows = (parse_line(line) for line in reversed(lines) if line.endswith(b"\n"))
    return next((row for row in rows if row is not None), None)


def _last_piece(file: Any) -> bytes:
    """The bytes after the last newline."""
    size = file.seek(0, os.SEEK_END)
    piece = b""
    while size > 0:
        start = max(0, size - _TAIL_BYTES)
        file.seek(start)
        block = file.read(size - start)
        _, newline, tail = block.rpartition(b"\n")
        piece = tail + piece
        if newline:
            break
        size = start
    return piece


def recent_rows(path: str | Path, tail_bytes: int = 1 << 18) -> list[dict[str, Any]]:
    """The last complete lines that are JSON objects, as many as fit into `tail_bytes`; none without the file."""
    path = Path(path)
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - tail_bytes))
        lines = file.read().split(b"\n")[:-1]
    return [row for line in lines[1 if size > tail_bytes else 0 :] if (row := parse_line(line)) is not None]
