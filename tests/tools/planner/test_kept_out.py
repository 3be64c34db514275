"""Rows that no fit may see: that none does, and how far predictions and verdicts are off on them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools.planner.published.rows import runs_of, runs_to_fit
from tools.planner.published.validate import ROWS, shipped_runs, unseen_errors, validate


@pytest.fixture(scope="module")
def blind_rows() -> list[dict[str, Any]]:
    return json.loads((ROWS.parent / "blind_runs.json").read_text(encoding="utf-8"))


def test_no_fit_sees_the_rows_that_are_kept_out(blind_rows: list[dict[str, Any]]) -> None:
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    assert all(row["kept_out"] is True for row in blind_rows)
    assert runs_to_fit(blind_rows) == [] and len(runs_to_fit(rows + blind_rows)) == len(shipped_runs())
    assert not {row["id"] for row in rows} & {row["id"] for row in blind_rows}
    # Not even where a group of the same name is fitted: the shipped factors predict, whichever group is left out.
    runs = [run for run in runs_of(blind_rows, "time")[0] if run.id == "kempner-mfu-09"]
    assert runs[0].group in {run.group for run in shipped_runs()}
    by_group, by_source = (unseen_errors(runs, key) for key in (lambda run: run.group, lambda run: run.source))
    assert by_group == by_source


def test_errors_and_verdicts_on_rows_that_are_kept_out(blind_rows: list[dict[str, Any]]) -> None:
    """The figures of docs/planner.md."""
    document = validate(blind_rows)
    speed, verdicts = document["tokens_per_s"], document["memory_verdicts"]
    assert (speed["rows"], speed["moe"]["rows"]) == (132, 32)
    assert (speed["median_abs_rel_err"], speed["p90_abs_rel_err"]) == pytest.approx((0.12, 0.26), abs=0.02)
    assert speed["dense"]["median_abs_rel_err"] == pytest.approx(0.10, abs=0.02)
    assert speed["moe"]["median_abs_rel_err"] == pytest.approx(0.17, abs=0.02)
    assert verdicts["ran out of memory"] == {"fits": 9, "at risk": 4, "does not fit": 47}
    assert verdicts["ran"] == {"fits": 112, "at risk": 6, "does not fit": 5}
