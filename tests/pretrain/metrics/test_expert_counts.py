"""experts.jsonl: bounded, the same over attempts and rollbacks, and no reason to stop."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.metrics.expert_counts import MOST_BYTES, ExpertCounts, interval_at, most_rows, read_expert_counts
from pretrain.run.files import as_line


def make(path: Path, said: list[str] | None = None, experts: int = 4) -> ExpertCounts:
    return ExpertCounts(path, [1, 2], experts, 1, ([] if said is None else said).append)


def train(counts: ExpertCounts, after: int, last: int) -> None:
    for step in range(after + 1, last + 1):
        if counts.is_due(step):
            counts.append(step, 8, [[step % 9, 1, 2, 3], [0, 0, 8, 8]])


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_expert_counts(path)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 50), st.integers(1, 300), st.integers(0, 10**7))
def test_the_interval_is_the_smallest_that_leaves_room(first: int, rows: int, step: int) -> None:
    interval = interval_at(step, first, rows)
    assert step // interval <= rows
    assert interval == first or step // (interval // 2) > rows


def test_the_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "experts.jsonl"
    train(make(path), 0, 1100)
    assert steps(path) == list(range(8, 1101, 8)), "at most 256 rows: the interval has doubled three times"
    # 58 layers of 256 experts, as DeepSeek-V3 has.
    assert most_rows(58 * 256) * 58 * 256 * 8 <= MOST_BYTES and most_rows(10**9) == 16


def test_attempts_and_rollbacks_leave_the_rows_of_a_run_without(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    train(make(whole), 0, 700)
    first = make(parts)
    train(first, 0, 500)
    first.cut_back(450)
    train(first, 450, 600)
    with open(parts, "ab") as file:
        file.write(b'{"step": 601, "to')
    second = make(parts)
    second.cut_back(550)
    train(second, 550, 700)
    assert parts.read_bytes() == whole.read_bytes()


def test_foreign_rows_are_passed_over_and_leave_with_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "experts.jsonl"
    good = {"step": 1, "tokens": 8, "layers": [1], "counts": [[4, 4]]}
    bad = [good | change for change in ({"step": "1"}, {"counts": [[4, "<script>"]]}, {"counts": [[]]}, {"layers": [1, 2]})]
    path.write_bytes(b"junk\n" + b"".join(map(as_line, [*bad, good, good | {"counts": [[4, -4]]}])) + b"[1]\n")
    assert list(read_expert_counts(path)) == [good]
    assert list(read_expert_counts(tmp_path / "none.jsonl")) == []


def test_a_refusing_disk_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    counts = make(tmp_path / "absent" / "experts.jsonl", said)
    train(counts, 0, 3)
    assert len(said) == 1 and said[0].startswith("expert counts are not written: ") and said[0].endswith("training goes on")


def test_a_model_without_experts_writes_nothing(tmp_path: Path) -> None:
    dense = ExpertCounts(tmp_path / "experts.jsonl", [], 0, 1, print)
    assert not any(map(dense.is_due, range(20)))
    assert not any(map(ExpertCounts(tmp_path / "experts.jsonl", [0], 8, 0, print).is_due, range(20)))
