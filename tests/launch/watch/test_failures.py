"""Which failure is told first, from what ranks and torchrun leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.watch.failures import find_failures

SUMMARY = """
  rank      : {rank} (local_rank: {rank})
  exitcode  : -6 (pid: 17)
"""


@pytest.mark.parametrize(("kind", "first"), [("bad_input", 0), ("exception", 1)])
def test_a_refusal_comes_before_a_partner_that_aborts(kind: str, first: int, tmp_path: Path) -> None:
    """Rank 0 refuses for all ranks, and rank 1 aborts when rank 0 is gone. An exception may have come after the abort."""
    failure = {"rank": 0, "node": "n1", "time": 5.0, "kind": kind, "text": "1 problem"}
    (tmp_path / "rank_0.failure.json").write_text(json.dumps(failure))
    (tmp_path / "torchrun.log").write_text(SUMMARY.format(rank=1))
    found = find_failures(tmp_path)
    assert [failure.rank for failure in found] == [first, 1 - first]
