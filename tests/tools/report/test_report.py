"""The report without a browser: curves keep what counts, files of any kind make one page, bad input is one report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from pretrain.run import follow
from pretrain.run.evaluations import append_evaluation
from pretrain.run.folder import RunFolder
from tests.tools.report.ladder_world import make_ladder, true_loss
from tests.tools.report.world import add_rows, make_run, row
from tools import cli
from tools.ladder import scaling
from tools.report import collect, page
from tools.report.collect import RunReader
from tools.report.curves import Curves
from tools.report.ladder import LadderReader

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def points(found: dict[str, Any], name: str) -> tuple[list[int], list[float]]:
    (curve,) = (one for one in found["curves"] if one["name"] == name)
    return np.cumsum(curve["x"]).tolist(), curve["y"]


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 12_000), st.integers(1, 400), st.data())
def test_no_extreme_is_lost(rows: int, part: int, data: st.DataObject) -> None:
    spike, dip = data.draw(st.integers(1, rows)), data.draw(st.integers(1, rows))
    values = np.random.default_rng(rows).uniform(1, 2, rows + 1)
    values[dip] = -50.0
    values[spike] = 100.0
    values = values.tolist()
    curves = Curves()
    for first in range(1, rows + 1, part * 50):
        curves.add([{"step": step, "loss": values[step]} for step in range(first, min(first + part * 50, rows + 1))])
    found = curves.points(room=200)
    steps, losses = points(found, "loss")
    assert losses[steps.index(spike)] == 100.0
    assert dip == spike or losses[steps.index(dip)] == -50.0
    assert steps == sorted(set(steps)) and len(steps) <= 400
    assert found["newest"]["loss"] == values[rows] and found["rows"] == rows
    for step, loss in zip(steps, losses, strict=True):
        assert loss == pytest.approx(values[step], rel=1e-6)
    if not found["whole"]:
        (curve,) = found["curves"]
        sizes = np.diff(np.cumsum(found["axis"]["steps"]), prepend=0)
        assert np.dot(sizes, curve["mean"]) == pytest.approx(sum(values[1:]), rel=1e-3), "the means are those of all steps"


def test_a_short_run_is_whole_and_has_its_axes() -> None:
    curves = Curves()
    curves.add([row(step) for step in range(1, 8)])
    curves.add([row(8) | {"late": 5}])
    found = curves.points(1000)
    assert found["whole"] and points(found, "late") == ([8], [5])
    assert np.cumsum(found["axis"]["steps"]).tolist() == list(range(1, 9))
    assert found["axis"]["tokens"] == [4096 * step for step in range(1, 9)] and found["axis"]["seconds"][-1] == 4


def test_a_long_read_tells_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", 20)
    monkeypatch.setattr(follow, "_PART_BYTES", 1000)
    monkeypatch.setattr(collect, "LINE_INTERVAL_S", 0.0)
    RunReader(folder).read(100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and all(line.startswith(f"{folder.metrics}: ") and line.endswith(" MB read") for line in lines)


def test_rows_of_any_kind_are_harmless() -> None:
    curves = Curves()
    bad = [{"step": "3"}, {"step": True}, {"step": 2}, {"step": 10**400, "loss": 1}, {"loss": 1.0}]
    curves.add([row(2), *bad, row(3) | {"loss": HOSTILE, "grad_norm": [1], "lr": 10**400, HOSTILE: 1.0, "x" * 5000: 1.0}])
    curves.add([{"step": 4, "loss": None, "nonfinite": {"loss": "nan"}}, {"step": 5, "nonfinite": HOSTILE, "loss": float("inf")}])
    curves.add([{"step": 6, **{f"name_{number}": number for number in range(1000)}}])
    found = curves.points(1000)
    assert found["left_out"] == 5 and points(found, "loss")[0] == [2] and len(found["curves"]) <= 160
    assert [mark["kind"] for mark in found["marks"]] == ["nonfinite", "skip"]
    page.as_data(found)


def test_a_rollback_is_followed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 20)
    reader = RunReader(folder)
    assert reader.read(1000)["curves"]["rows"] == 20
    add_rows(folder, 21, 25)
    assert reader.read(1000)["curves"]["last_step"] == 25
    kept = folder.metrics.read_text().splitlines(keepends=True)[:10]
    (tmp_path / "new").write_text("".join(kept))
    (tmp_path / "new").replace(folder.metrics)
    add_rows(folder, 11, 12)
    found = reader.read(1000)["curves"]
    assert (found["rows"], found["last_step"], found["left_out"]) == (12, 12, 0)


def test_the_document_tells_the_run(tmp_path: Path) -> None:
    found = RunReader(make_run(tmp_path / "run")).read(1000)
    first, second = found["life"]["attempts"]
    assert (first["state"], first["end_s"] - first["start_s"], first["saves"], second["first_step"]) == ("stopped", 18, 1, 21)
    assert [mark["kind"] for mark in found["marks"]] == ["attempt", "layout", "skip"]
    assert found["marks"][1]["text"] == "attempt 2 begins with step 21: pipeline 2 → 1"
    assert found["settings"]["changes"] == [[2, [["parallel.pipeline", "2", "1"]]]]
    assert ["run.steps", "40", "command line"] in found["settings"]["values"]
    experts = found["experts"]
    assert experts["ratio"] == [[1.5] * 3, [1.0] * 3] and experts["dead"] == [[1] * 3, [0] * 3]
    shares = np.array([40, 40, 48]) / 128
    entropy = -(shares * np.log(shares)).sum() / np.log(4)
    assert np.allclose(experts["entropy"], [[entropy] * 3, [1.0] * 3], atol=1e-4)
    assert len(found["layout"]["memory"]["ranks"]) == 2 and found["layout"]["grid"] and found["layout"]["pipeline"]
    assert found["cost"]["ranks"] == 4 and found["status"]["state"] == "finished"


def spoil(folder: RunFolder) -> None:
    """`<script>` in every string, a half row, foreign lines."""
    for path in (folder.events, folder.outcome, folder.provenance, folder.experts):
        text = re.sub(r'"(stopped|finished)"', r'"\1"', path.read_text())
        text = text.replace("SIGINT after step 20", HOSTILE).replace("all 40 steps are done", HOSTILE).replace("v1", HOSTILE)
        path.write_text(text.replace("command line", HOSTILE).replace("2.13.0", HOSTILE))
    text = folder.config.read_text().replace("name: quickstart", f"name: {json.dumps(HOSTILE)}")
    folder.config.write_text(text)
    with open(folder.metrics, "a") as file:
        foreign = {"step": 41, HOSTILE: 3.0, "loss": HOSTILE, "nonfinite": {HOSTILE: "nan"}}
        file.write(f'[1]\nnull\n{json.dumps(foreign)}\n{{"step": 42, "lo')
    with open(folder.events, "a") as file:
        file.write(json.dumps({"time": 1.0, "attempt": 2, "kind": HOSTILE}) + '\n{"time": 1e999}\n{"ti')


def test_hostile_strings_end_no_element(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "<script>alert(2)<")
    spoil(folder)
    assert cli.run(["report", str(folder.path), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    text = (tmp_path / "page.html").read_text()
    # The page's own three elements; plotly's and our scripts have none in their text.
    assert len(re.findall(r"<script[ >]", text)) == 3 and text.count("</script>") == 3
    assert text.index("Content-Security-Policy") < text.index("<script")
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == (tmp_path / "page.html").stat().st_size and document["runs"][0]["step"] == 41


def test_bad_input_is_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text('{"step": 1}\n')
    folder = make_run(tmp_path / "run")
    cases = (
        (("none",), "must be a run folder; nothing is there"),
        (("foreign",), "must be a run folder"),
        (("run", "--serve", "--out", "x.html"), "a served page is no file"),
        (("run", "--serve", "99999"), "must be a free port of 127.0.0.1"),
        (("run", "--out", "absent/x.html"), "No such file"),
    )
    monkeypatch.chdir(tmp_path)
    for words, text in cases:
        before = sorted(tmp_path.rglob("*"))
        assert cli.run(["report", *words]) == 2
        assert text in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
    page.plotly_script.cache_clear()
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    assert cli.run(["report", str(folder.path)]) == 2 and "pip install 'phalanx[report]'" in capsys.readouterr().err


def test_damage_is_told_and_the_rest_stays(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    folder.config.write_text("model: [")
    (folder.launch_dir(2) / "config.yaml").write_bytes(b"\xff\x00")
    folder.experts.write_text("junk\n")
    folder.provenance.write_text("[]")
    folder.outcome.write_text('{"state": 3}')
    found = RunReader(folder).read(1000)
    assert found["experts"] is None and found["curves"]["rows"] == 40
    assert found["layout"]["problem"] and found["settings"]["problem"]
    for path in folder.path.rglob("*.jsonl"):
        path.unlink()
    folder.experts.mkdir()
    with pytest.raises((ConfigError, OSError)):
        RunReader(folder).read(1000)


def test_scores_are_curves_and_rows_of_any_kind_are_harmless(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for step, score in ((20, 0.25), (10, 0.5), (20, 0.75)):
        append_evaluation(folder, {"step": step, "scores": {"t/acc": score}, "stderr": {"t/acc": score / 10}})
    with open(folder.evaluations, "a") as file:
        file.write('{"step": 30, "scores": {"t/acc": NaN, "t/other": true}}\n{"step": 40, "scores": 3}\nno JSON\n')
    found = RunReader(folder).read(1000)["tasks"]
    assert found == [{"name": "t/acc", "steps": [10, 20], "scores": [0.5, 0.75], "stderr": 0.075}]


def test_a_ladder_has_its_points_and_its_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "RESAMPLES", 8)
    ladder = make_ladder(tmp_path)
    found = LadderReader(ladder).read()
    assert len(found["points"]) == 12 and {one["state"] for one in found["points"]} == {"finished"}
    # The validation loss that each run ended with, which 300 longer rows follow.
    assert all(
        one["loss"] == pytest.approx(true_loss(one["parameters"], one["tokens"]), rel=2e-3) for one in found["law"]["runs"]
    )
    curve = found["law"]["curve"]
    ratio = curve["tokens_per_parameter"]
    for compute, loss, low, high in zip(curve["compute"], curve["loss"], curve["low"], curve["high"], strict=True):
        size = (compute / 6 / ratio) ** 0.5
        assert low <= high
        if compute <= curve["largest"]:
            assert loss == pytest.approx(true_loss(size, ratio * size), rel=1e-2)


def test_a_ladder_that_is_not_done_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ladder = make_ladder(tmp_path, points=1)
    reader = LadderReader(ladder)
    found = reader.read()
    assert found["law"]["why"].startswith("after 11 more points") and [point.name for point in reader.begun()] == [
        "hidden_size64-steps200"
    ]
    assert cli.run(["report", str(ladder.folder), str(ladder.folder)]) == 2
    assert "a ladder has a page of its own" in capsys.readouterr().err
