"""metrics.jsonl, the record of a run: one row a step, each step once over all attempts, in ascending order.

In: rows, as dicts with at least `step`, `loss`, `grad_norm` and `tokens`. Out: the file, cut back at a resume. Steps count from
1. Row N is written once, after the Nth optimizer update, and includes the numbers of a validation after that update.

A row with a step time has the sum of those up to it as `steps_s`, so that nobody has to read the whole record for it.

A row is handed to the kernel immediately, so a killed process loses none. `sync` forces the rows to the disk. It is called
before a checkpoint is marked complete, so that a power loss can't take a row that a checkpoint has counted.

A failing disk doesn't end the training. Rows that it refuses wait in memory, and the next row or `sync` tries again. A process
that dies meanwhile loses them, but no checkpoint has counted them, so the next attempt trains those steps again.

Torch-free.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.run.events import EventKind
from pretrain.run.files import (
    as_line,
    iterate_lines,
    mend_torn_line,
    storage_error,
    storage_problem,
    sync_folder,
)
from pretrain.run.record_rows import encode_row, place_before, steps_seconds

REQUIRED_KEYS = ("step", "loss", "grad_norm", "tokens")
_COPIED_BYTES = 1 << 22

WriteEvent = Callable[..., None]


class Record:
    """The record, opened by an attempt, which is its only writer."""

    def __init__(self, path: Path, last_step: int, write_event: WriteEvent) -> None:
        self.path = path
        self.last_step = last_step
        self._write_event = write_event
        self._steps_s = steps_seconds(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # Lines that the disk refused. The first one may be the rest of a line.
        self._waiting = bytearray()
        self._refused_s: float | None = None

    @classmethod
    def open(cls, path: Path, restored_step: int, write_event: WriteEvent, keep_cut_in: Path | None = None) -> Record:
        """Cut the record back to `restored_step` and open it. 0: nothing was restored.

        `write_event(kind, **fields)` reports repairs, cuts and gaps; rank 0 passes `Attempt.event`. The rows that are cut go to
        the file `keep_cut_in`. The attempt computes those steps again, bit for bit on an unchanged layout. Raises DiskError
        when the disk refuses.
        """
        try:
            if torn_bytes := mend_torn_line(path):
                write_event(EventKind.RECORD_MENDED, cut_bytes=torn_bytes)
            last_step = _cut(path, restored_step, write_event, keep_cut_in) if path.exists() else 0
            if last_step < restored_step:
                write_event(EventKind.RECORD_GAP, after_step=last_step, restored_step=restored_step)
            return cls(path, restored_step, write_event)
        except OSError as error:
            raise storage_error("run.dir", path, error) from error

    def append(self, row: dict[str, Any]) -> None:
        """Add the row of the next step. It waits in memory when the disk refuses it."""
        missing = [key for key in REQUIRED_KEYS if key not in row]
        assert not missing, f"a row of the record lacks {missing}"
        step = row["step"]
        assert step > self.last_step, f"step {step} is in the record already, which is at {self.last_step}"
        if step != self.last_step + 1:
            self._write_event(EventKind.RECORD_GAP, after_step=self.last_step, next_step=step)
        self.last_step = step
        if "step_time_s" in row:
            self._steps_s += row["step_time_s"]
            row = row | {"steps_s": round(self._steps_s, 6)}
        self._waiting += as_line(encode_row(row))
        try:
            self._write_waiting()
        except OSError as error:
            if self._refused_s is None:
                self._refused_s = time.time()
                why = storage_problem("run.dir", self.path, error).rule
                self._write_event(EventKind.RECORD_REFUSED, after_step=step - 1, why=why)

    def _write_waiting(self) -> None:
        """Hand the waiting lines to the kernel. A disk that is almost full takes a part of them. Raises OSError."""
        while self._waiting:
            written = os.write(self._descriptor, self._waiting)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            del self._waiting[:written]
        if self._refused_s is not None:
            seconds, self._refused_s = round(time.time() - self._refused_s, 3), None
            self._write_event(EventKind.RECORD_ACCEPTED, step=self.last_step, seconds=seconds)

    def cut_back(self, step: int, keep_cut_in: Path) -> None:
        """After a rollback to `step`, move the later rows to `keep_cut_in`. The next row is that of `step` + 1.

        Raises DiskError when the disk refuses.
        """
        try:
            self._write_waiting()
            _cut(self.path, step, self._write_event, keep_cut_in)
            os.close(self._descriptor)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error("run.dir", self.path, error) from error
        self.last_step, self._steps_s = step, steps_seconds(self.path)

    def sync(self) -> None:
        """Force every row to the disk. Call it before a checkpoint is marked complete. Raises DiskError when it refuses."""
        try:
            self._write_waiting()
            os.fsync(self._descriptor)
        except OSError as error:
            raise storage_error("run.dir", self.path, error) from error

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._descriptor)


def _cut(path: Path, restored_step: int, write_event: WriteEvent, keep_cut_in: Path | None) -> int:
    """Drop rows past `restored_step`, repeated steps and lines that are no rows. Returns the last step that stays.

    A whole record is read only behind the restored step, so that a record of gigabytes is cut in an instant.
    """
    end = _end_of(path, restored_step)
    if end is None:
        return _cut_damaged(path, restored_step, write_event, keep_cut_in)
    if count := _truncate(path, end, keep_cut_in):
        _tell_cut(write_event, count, restored_step, keep_cut_in)
    return restored_step


def _end_of(path: Path, step: int) -> int | None:
    """The byte behind the row of this step. None: a line near it is no row, or no row is that of the step."""
    if step == 0:
        return 0
    place, before = place_before(path, step), 0
    is_rest = place > 0
    for line, row in iterate_lines(path, place):
        place += len(line)
        if is_rest:
            is_rest = False
            continue
        found = _staying_step(row, before, step)
        if found is None:
            return None
        if found == step:
            return place
        before = found
    return None


def _truncate(path: Path, end: int, keep_cut_in: Path | None) -> int:
    """Move the lines from byte `end` on to the end of `keep_cut_in`. Returns their number."""
    count = 0
    with open(path, "r+b") as file, open(keep_cut_in or os.devnull, "ab") as cut:
        file.seek(end)
        while part := file.read(_COPIED_BYTES):
            count += part.count(b"\n")
            cut.write(part)
        if count:
            cut.flush()
            if keep_cut_in:
                os.fsync(cut.fileno())
            file.truncate(end)
            os.fsync(file.fileno())
    return count


def _tell_cut(write_event: WriteEvent, rows: int, restored_step: int, keep_cut_in: Path | None) -> None:
    kept_in = keep_cut_in.name if keep_cut_in else None
    write_event(EventKind.RECORD_CUT, rows=rows, restored_step=restored_step, kept_in=kept_in)


def _cut_damaged(path: Path, restored_step: int, write_event: WriteEvent, keep_cut_in: Path | None) -> int:
    """As `_cut`, in a record that is damaged or has a gap near the restored step: every line is looked at.

    The first pass reads only. A second pass rewrites the file, and runs only when a line must go.
    """
    last_step, whole = 0, True
    gaps: list[tuple[int, int]] = []
    for _, row in iterate_lines(path):
        step = _staying_step(row, last_step, restored_step)
        if step is None:
            whole = False
            continue
        if step != last_step + 1:
            gaps.append((last_step, step))
        last_step = step
    for before, after in gaps[:10]:
        write_event(EventKind.RECORD_GAP, after_step=before, next_step=after)
    if not whole:
        _tell_cut(write_event, _rewrite(path, restored_step, keep_cut_in), restored_step, keep_cut_in)
    return last_step


def _staying_step(row: dict[str, Any] | None, last_step: int, restored_step: int) -> int | None:
    """The row's step. None: the row doesn't stay in the record."""
    step = row.get("step") if row is not None else None
    return step if isinstance(step, int) and last_step < step <= restored_step else None


def _rewrite(path: Path, restored_step: int, keep_cut_in: Path | None) -> int:
    """Rewrite the record without the lines that go, and append those to `keep_cut_in`. Returns their number.

    The new file replaces the old one by a rename, so a process that has the old file open can still read it to its end.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    last_step, count = 0, 0
    try:
        with open(beside, "wb") as kept, open(keep_cut_in or os.devnull, "ab") as cut:
            for line, row in iterate_lines(path):
                step = _staying_step(row, last_step, restored_step)
                if step is None:
                    cut.write(line)
                    count += 1
                else:
                    kept.write(line)
                    last_step = step
            for file in (kept, cut) if keep_cut_in else (kept,):
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return count
