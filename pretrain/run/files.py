"""Files that a crash can't leave half-written. In: a path and its content. Out: the old file or the new one, never a mixture.

A whole file is written under a temporary name in the same folder and then renamed. A JSON-lines file is appended to, and an
incomplete last line is repaired when the file is opened the next time.

Torch-free.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from configs.errors import ConfigError, DiskError, Problem

_TAIL_BYTES = 1 << 16
# A row has some kilobytes.
_LINE_BYTES = 1 << 24
# Of files that are read in parts.
_PART_BYTES, _BUFFER_BYTES = 1 << 22, 1 << 20

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
# What a disk says that is full, read-only, broken or away. Other errors are of the path, or our own.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}


def storage_problem(key: str, path: str | Path, error: OSError) -> Problem:
    """The Problem that reports a failed write or read to the user. `key`: the config key that chose the path."""
    rule, fix = _RULES.get(error.errno or 0, ("the file system must accept the file", "choose another folder"))
    return Problem(key, str(path), f"{rule} ({error.strerror or error}: {error.filename or path})", fix)


def storage_error(key: str, path: str | Path, error: OSError) -> ConfigError:
    """`storage_problem` as an error to raise: a DiskError where the disk is at fault."""
    problem = storage_problem(key, path, error)
    return DiskError(problem) if is_of_the_disk(error) else ConfigError(problem)


def is_of_the_disk(error: OSError) -> bool:
    """Whether a disk is full, read-only, broken or away."""
    return error.errno in _OF_THE_DISK


def check_room(folder: Path, num_bytes: int = 1 << 20) -> None:
    """Write and sync so many bytes in a new file, and remove it. Raises OSError where the disk refuses them.

    Written and synced, because file systems notice a full disk or quota at different moments.
    """
    path = folder / f".room.{os.getpid()}.tmp"
    try:
        with open(path, "wb", buffering=0) as probe:
            if probe.write(b"\0" * num_bytes) < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            os.fsync(probe.fileno())
    finally:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power loss. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, data: bytes | str, durable: bool = True) -> None:
    """Write a temporary file in the same folder, fsync it, and rename it to `path`.

    Raises OSError. The old content is then unchanged and the temporary file is removed. `durable` False leaves out the fsync,
    for files that are rewritten every few seconds. Readers still see either the old or the new content.
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


def write_named_file(path: str | Path, data: bytes) -> None:
    """Write a file whose path a user has typed. Raises OSError.

    A link is followed. What is no regular file, such as /dev/null or a pipe, is written into: a rename would replace it.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_bytes(data)
    else:
        write_atomically(target, data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises OSError, and ValueError for NaN and infinity, which JSON lacks."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any | None:
    """The value in the file. None: the file doesn't exist, or another program or a crash left something that is no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object in the line. None: the line holds something else."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        # Python also reads what only JSON's edges have: NaN, a lone surrogate that stands for a byte of a file's name.
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def iterate_lines(path: str | Path, start: int = 0) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each complete line with its newline from byte `start` on, and the line's JSON object, or None where it has none.

    An incomplete last line is left out. A line of more than _LINE_BYTES has no object and comes in pieces, so that a damaged
    file of gigabytes takes little memory. Raises OSError.
    """
    with open(path, "rb", buffering=_BUFFER_BYTES) as file:
        file.seek(start)
        is_rest = False
        while line := file.readline(_LINE_BYTES):
            is_whole = line.endswith(b"\n")
            if not is_whole and len(line) < _LINE_BYTES:
                return
            yield line, parse_line(line) if is_whole and not is_rest else None
            is_rest = not is_whole


def iterate_parts(path: str | Path, start: int = 0) -> Iterator[bytes]:
    """The complete lines of a file from byte `start` on, some megabytes of them at a time.

    A line of more than _LINE_BYTES may be left out. Raises OSError.
    """
    with open(path, "rb", buffering=_BUFFER_BYTES) as file:
        file.seek(start)
        while part := file.read(_PART_BYTES) + file.readline(_LINE_BYTES):
            if not part.endswith(b"\n"):
                part = part[: part.rfind(b"\n") + 1]
                while (rest := file.readline(_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
            if part:
                yield part


def lines_from_end(path: str | Path) -> Iterator[bytes]:
    """The complete lines of a file without their newlines, the last one first. Only what is taken is read. Raises OSError.

    A line of more than _LINE_BYTES may come cut.
    """
    # The first piece stands behind the last newline.
    return islice(_pieces_from_end(path), 1, None)


def _pieces_from_end(path: str | Path) -> Iterator[bytes]:
    """What stands between the newlines of a file, the last piece first."""
    with open(path, "rb") as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start > 0:
            end, start = start, max(0, start - _PART_BYTES)
            file.seek(start)
            first, *pieces = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(pieces)
            rest = first if len(first) <= _LINE_BYTES else b""
        yield rest


def as_line(row: dict[str, Any]) -> bytes:
    """The row as a line of a JSON-lines file. Raises ValueError for NaN and infinity, which JSON lacks."""
    return json.dumps(row, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def append_line(descriptor: int, row: dict[str, Any]) -> None:
    """Append one line with one write, so that only a kill during the write can leave a part of it. Raises OSError."""
    line = as_line(row)
    written = os.write(descriptor, line)
    if written != len(line):
        # A line that lacks its newline only would be mended, and be there twice once the caller has tried again. What another
        # process has appended behind the part stays.
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        if os.fstat(descriptor).st_size == end:
            os.ftruncate(descriptor, end - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mend_torn_line(path: str | Path) -> int:
    """Complete or remove a last line that has no newline. Returns the number of bytes removed. Raises OSError.

    A line that is a whole JSON object gets its newline: a prefix of an object is never a valid object.
    """
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = _behind_last_newline(file, size)
        file.seek(start)
        if 0 < size - start <= _LINE_BYTES and parse_line(file.read()) is not None:
            file.write(b"\n")
            return 0
        if start < size:
            file.truncate(start)
    return size - start


def last_row(path: str | Path) -> dict[str, Any] | None:
    """The last complete JSON object of a JSON-lines file. Reads its last 64 KiB. None: they contain no object."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    rows = (parse_line(line) for line in reversed(lines) if line.endswith(b"\n"))
    return next((row for row in rows if row is not None), None)


def _behind_last_newline(file: BinaryIO, size: int) -> int:
    """The byte behind the last newline of an open file of `size` bytes; 0: it has none."""
    while size > 0:
        start = max(0, size - _TAIL_BYTES)
        file.seek(start)
        newline = file.read(size - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        size = start
    return 0


def recent_rows(path: str | Path, tail_bytes: int = 1 << 18) -> list[dict[str, Any]]:
    """The JSON objects of the complete lines in the file's last `tail_bytes`, oldest first; empty without a file."""
    path = Path(path)
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - tail_bytes))
        lines = file.read().split(b"\n")[:-1]
    return [row for line in lines[1 if size > tail_bytes else 0 :] if (row := parse_line(line)) is not None]
