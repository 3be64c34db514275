"""The record: each step exactly once over all attempts, whatever was killed, restored or torn."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.run import files, record_rows
from pretrain.run.record import Record
from pretrain.run.record_rows import decode_row, encode_row, place_before, read_rows, rows_from_end, steps_seconds


class Notes:
    """Collects what the record remarks."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, **fields: Any) -> None:
        self.heard.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.heard]


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": 0.5, "tokens": 8 * step}


def write(path: Path, restored: int, last: int, notes: Notes | None = None, **more: Any) -> None:
    record = Record.open(path, restored, notes or Notes(), **more)
    for step in range(restored + 1, last + 1):
        record.append(row(step))
    record.close()


def steps(path: Path) -> list[int]:
    return [found["step"] for found in read_rows(path)]


def test_resume_cuts_back_and_keeps_what_it_cut(tmp_path: Path) -> None:
    path, cut, notes = tmp_path / "metrics.jsonl", tmp_path / "metrics_cut.jsonl", Notes()
    write(path, 0, 10)
    write(path, 6, 12, notes, keep_cut_in=cut)
    assert steps(path) == list(range(1, 13)) and steps(cut) == [7, 8, 9, 10]
    assert notes.heard == [("record_cut", {"rows": 4, "restored_step": 6, "kept_in": "metrics_cut.jsonl"})]
    write(path, 12, 14, notes)
    assert steps(path) == list(range(1, 15)) and len(notes.heard) == 1, "nothing to cut, nothing to say"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(0, 25)), max_size=6))
def test_each_step_once_over_any_attempts(tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[int, int, int]]) -> None:
    """Attempts restore anywhere, train some steps, die and tear the last line anywhere."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    for restored, count, torn_bytes in attempts:
        whole = steps(path)[-1] if path.exists() and steps(path) else 0
        restored = min(restored, whole)
        write(path, restored, restored + count)
        data = path.read_bytes()
        path.write_bytes(data[: max(0, len(data) - torn_bytes)])
    if attempts:
        last = steps(path)[-1] if steps(path) else 0
        write(path, last, last)
        assert steps(path) == list(range(1, last + 1))
        assert path.read_bytes().endswith(b"\n") or last == 0


def test_a_long_record_is_cut_and_read_near_the_step_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cut, notes = tmp_path / "metrics.jsonl", tmp_path / "metrics_cut.jsonl", Notes()
    last = 20_000
    path.write_text(
        "".join(json.dumps(row(step) | {"step_time_s": 0.5, "filler": "x" * 600}) + "\n" for step in range(1, last + 1))
    )
    parsed, parse = [], files.parse_line
    for module in (files, record_rows):
        monkeypatch.setattr(module, "parse_line", lambda line: parsed.append(line) or parse(line))
    record = Record.open(path, last - 10, notes, keep_cut_in=cut)
    record.append(row(last - 9) | {"step_time_s": 2.0})
    assert notes.heard == [("record_cut", {"rows": 10, "restored_step": last - 10, "kept_in": "metrics_cut.jsonl"})]
    assert len(parsed) < last / 20 and path.read_bytes().count(b"\n") == last - 9
    (newest,) = islice(rows_from_end(path), 1)
    # The first rows have no sum: their step times are summed once.
    assert newest["step"] == last - 9 and newest["steps_s"] == (last - 10) / 2 + 2 == steps_seconds(path)
    record.cut_back(5, cut)
    record.close()
    assert steps(path) == [1, 2, 3, 4, 5] and steps(cut) == [*range(last - 9, last + 1), *range(6, last - 8)]
    for step in (1, 2, 5, 6):
        assert next(read_rows(path, place_before(path, step)))["step"] <= max(step, 5)


def test_a_gap_is_loud_and_does_not_stop_the_run(tmp_path: Path) -> None:
    path, notes = tmp_path / "metrics.jsonl", Notes()
    write(path, 0, 3)
    record = Record.open(path, 5, notes)
    record.append(row(6))
    record.append(row(8))
    record.close()
    assert notes.heard == [
        ("record_gap", {"after_step": 3, "restored_step": 5}),
        ("record_gap", {"after_step": 6, "next_step": 8}),
    ]
    assert steps(path) == [1, 2, 3, 6, 8]


def test_foreign_and_repeated_lines_go(tmp_path: Path) -> None:
    path, notes = tmp_path / "metrics.jsonl", Notes()
    lines = [json.dumps(row(1)), "\0\0\0", json.dumps(row(2)), json.dumps(row(2, 9.0)), json.dumps(row(1)), '{"step": 3, "lo']
    path.write_text("\n".join(lines))
    write(path, 2, 3, notes)
    assert [found["loss"] for found in read_rows(path)] == [1.0, 1.0, 1.0] and steps(path) == [1, 2, 3]
    assert notes.kinds() == ["record_mended", "record_cut"]


def test_a_row_is_written_once_and_complete(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "metrics.jsonl", 0, Notes())
    record.append(row(1))
    with pytest.raises(AssertionError, match="step 1 is in the record already"):
        record.append(row(1))
    with pytest.raises(AssertionError, match="lacks"):
        record.append({"step": 2, "loss": 1.0})


def test_nonfinite_values_stay_json_and_come_back(tmp_path: Path) -> None:
    bad = {**row(1), "loss": math.nan, "grad_norm": math.inf, "aux": -math.inf}
    encoded = encode_row(bad)
    assert encoded["loss"] is None and encoded["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "aux": "-inf"}
    decoded = decode_row(json.loads(json.dumps(encoded, allow_nan=False)))
    assert math.isnan(decoded.pop("loss")) and decoded == {key: value for key, value in bad.items() if key != "loss"}
    assert encode_row(row(1)) == row(1)


def test_a_killed_writer_loses_no_row(tmp_path: Path) -> None:
    """Rows are with the kernel at once: SIGKILL right after an append keeps it."""
    code = """
import os, sys
from pathlib import Path
from pretrain.run.record import Record
record = Record.open(Path(sys.argv[1]), 0, lambda kind, **fields: None)
for step in range(1, 101):
    record.append({"step": step, "loss": 1.0, "grad_norm": 1.0, "tokens": step})
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "metrics.jsonl")])
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 101))


def test_rows_that_a_full_disk_refuses_wait(tmp_path: Path) -> None:
    """A limit on the file's size stands for the full disk. It takes a part of a row. When it is gone, every row is there once."""
    code = """
import resource, signal, sys
from pathlib import Path
from configs.errors import ConfigError
from pretrain.run.record import Record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
record = Record.open(Path(sys.argv[1]), 0, lambda kind, **fields: print(kind, fields))
def train(first, last):
    for step in range(first, last + 1):
        record.append({"step": step, "loss": 1.0, "grad_norm": 1.0, "tokens": step})
train(1, 60)
assert Path(sys.argv[1]).stat().st_size == 1000
try:
    record.sync()
except ConfigError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
train(61, 61)
record.close()
"""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    refused, problem, accepted = done.stdout.split("\n", 1)[0], done.stdout, done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stderr
    assert refused.startswith("record_refused {'after_step': 17, ") and accepted.startswith("record_accepted {'step': 61, ")
    assert "run.dir = " in problem and "the file size limit must leave room" in problem and problem.count("record_") == 2
    assert steps(path) == list(range(1, 62))
