"""Ladders: their file, their bill, who waits for whom, and the scaling law against published constants."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from random import Random

import pytest

from configs.errors import ConfigError
from pretrain.run.folder import RunFolder
from tests.tools.report.ladder_world import BASE, make_ladder
from tools.cli import run
from tools.ladder.bill import price, total
from tools.ladder.ladder_file import read_ladder
from tools.ladder.names import is_ladder
from tools.ladder.observe import LAST_ROWS, observe
from tools.ladder.scaling import Observation, ScalingLaw, fit
from tools.ladder.start import Lanes

LADDER = """
ladder:
  base: {base}
  dir: {dir}
  max_running: 1
  points:
    - {{name: small, model.hidden_size: 64}}
    - {{model.hidden_size: 128, run.steps: 300}}
  grid:
    optimizer.lr: [1e-3, 3e-3]
    parallel.expert: [1]
"""


@pytest.fixture
def ladder_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "sizes.yaml"
    path.write_text(LADDER.format(base="base.yaml", dir=tmp_path / "runs"))
    return path


def test_points_are_crossed_with_the_grid_and_stay_as_written(ladder_file: Path) -> None:
    ladder = read_ladder(str(ladder_file))
    assert [point.name for point in ladder.points] == [
        *("small-lr1e-3-expert1", "small-lr3e-3-expert1"),
        *("hidden_size128-steps300-lr1e-3-expert1", "hidden_size128-steps300-lr3e-3-expert1"),
    ]
    configs = [loaded.config for _, loaded in ladder.load()]
    assert [(c.model.hidden_size, c.run.steps, c.optimizer.lr) for c in configs] == [
        *((64, 240, 1e-3), (64, 240, 3e-3), (128, 300, 1e-3), (128, 300, 3e-3))
    ]
    assert {c.metrics.wandb.group for c in configs} == {"sizes"}
    assert len({c.run.dir for c in configs}) == len({c.run.name for c in configs}) == 4


def test_the_bill_is_the_sum_of_the_plans(ladder_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(ladder_file), "cluster.price_per_gpu_hour_usd=2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    hours = [point["run"]["gpu_hours"] for point in document["points"]]
    assert document["total"]["gpu_hours"] == pytest.approx(sum(hours), abs=0.02)
    assert document["total"]["cost_usd"] == pytest.approx(2 * document["total"]["gpu_hours"])
    assert run(["plan", str(ladder_file)]) == 0
    assert "4 points" in capsys.readouterr().out
    alone = price(read_ladder(str(ladder_file)).load())
    assert total(alone)["cost_usd"] is None


def test_problems_of_all_points_are_told_at_once(ladder_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(ladder_file), "optimizer.lr=-1", "parallel.tensor=3"]) == 2
    said = capsys.readouterr().err
    assert "small-lr1e-3-expert1 and 3 more: optimizer.lr" in said and "3 more: parallel.tensor" in said
    assert run(["plan", str(ladder_file), "optimizer.lr=high", "run.dir=here"]) == 2
    said = capsys.readouterr().err
    assert "3 more: optimizer.lr" in said and "a ladder gives each run its folder" in said


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("ladder: 3", "ladder must be a mapping"),
        ("ladder: {base: quickstart}", "points, or a grid"),
        ("ladder: {grid: {optimizer.lr: [1]}}", "ladder.base"),
        ("ladder: {base: quickstart, grid: {optimizer.lr: 1}}", "must be a list of at least one value"),
        ("ladder: {base: quickstart, grid: {optimizer.lr: [1, 1]}}", "a name of its own"),
        ("ladder: {base: quickstart, points: [{name: ../x}]}", "a point's name is its folder's"),
        ("ladder: {base: quickstart, points: [3]}", "must be a list of mappings"),
        ("ladder: {base: quickstart, grid: {optimizer.lr: [1]}, max_running: 0}", "at least 1"),
        ("ladder: {base: quickstart, grid: {optimizer.lr: [1]}, rungs: 0}", "a ladder has base, dir"),
        ("ladder: {base: quickstart, grid: {optimizer.lr: [1]}}\nrun: {steps: 3}", "nothing else"),
    ],
)
def test_a_bad_file_is_one_report(tmp_path: Path, text: str, rule: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert is_ladder(str(tmp_path / "bad.yaml"))
    with pytest.raises(ConfigError) as refused:
        read_ladder(str(tmp_path / "bad.yaml"))
    assert rule in str(refused.value)


def test_a_launch_asks_and_a_dry_run_starts_nothing(
    ladder_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What starts the points is not reached, and these have no data.
    monkeypatch.setattr("tools.ladder.start.check_start", lambda config, with_data: None)
    assert run(["launch", str(ladder_file), "--dry-run"]) == 0
    assert run(["launch", str(ladder_file)]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert not (ladder_file.parent / "runs").exists()
    assert run(["status", str(ladder_file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["states"] == {"not started": 4} and document["scaling"]["form"] is None


def test_a_launched_ladder_is_read_from_its_folder(ladder_file: Path) -> None:
    ladder = read_ladder(str(ladder_file)).with_words(["run.steps=50"])
    ladder.write()
    assert is_ladder(str(ladder.folder))
    again = read_ladder(str(ladder.folder))
    assert [loaded.config for _, loaded in again.load()] == [loaded.config for _, loaded in ladder.load()]


@pytest.mark.prove
def test_a_ladder_is_run_here_and_goes_on_with_what_is_missing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"{{tokenizer: {{path: {folder / 'tok.model'}}}, train: [{{path: {folder / 'embedded'}}}]}}"
    (tmp_path / "base.yaml").write_text(
        f"base: quickstart\nmodel: {{num_layers: 2, hidden_size: 32}}\ndata: {data}\nparallel: {{pipeline: 1, expert: 1}}\n"
        "launch: {processes_per_node: 1}\nbatch: {global_batch_seqs: 4, micro_batch_seqs: 4, seq_length_tokens: 32}\n"
        "schedule: {warmup_steps: 1}\nrun: {steps: 3, eval_batches: 0}\nmetrics: {sinks: [jsonl]}\n"
    )
    path = tmp_path / "rates.yaml"
    path.write_text(f"ladder: {{base: base.yaml, dir: {tmp_path / 'runs'}, grid: {{optimizer.lr: [1e-3, 2e-3]}}}}")
    assert run(["launch", str(path), "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["states"] == {"finished": 2}
    shutil.rmtree(tmp_path / "runs" / "lr2e-3")
    assert run(["launch", str(path), "--yes"]) == 0
    assert "run 1 of 1" in capsys.readouterr().out
    assert run(["launch", str(path), "--yes"]) == 0
    assert "nothing to start" in capsys.readouterr().out
    assert run(["plan", str(tmp_path / "runs" / "lr1e-3"), "--measured", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3


@pytest.mark.parametrize("number", [1, 2, 5])
def test_no_more_jobs_run_than_lanes(number: int) -> None:
    """Whatever jobs are there before and however long each takes, at most `number` of those that wait run beside them."""
    random, lanes, waits = Random(number), Lanes(number), {}
    before = list(range(min(2, number)))
    for job in before:
        lanes.add([job])
        waits[job] = []
    for job in range(len(before), 20):
        lane, after = lanes.next()
        waits[job] = after
        lanes.add([job], lane)
    ended: set[int] = set()
    while len(ended) < len(waits):
        running = [job for job in waits if job not in ended and ended.issuperset(waits[job])]
        assert 0 < len(running) <= number
        ended.add(random.choice(running))


def published_loss(parameters: float, tokens: float) -> float:
    """Hoffmann et al., equation 10."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def test_the_fit_finds_the_published_constants() -> None:
    sizes = list(product((1e8, 3e8, 1e9, 3e9), (2e9, 1e10, 5e10)))
    tuned_worse = [Observation("worse", 1e8, 2e9, 5.0)]
    law = fit([*(Observation(f"{n}-{d}", n, d, published_loss(n, d)) for n, d in sizes), *tuned_worse])
    assert isinstance(law, ScalingLaw) and law.form == "chinchilla"
    for name, value in {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}.items():
        assert law.values[name] == pytest.approx(value, rel=1e-3), name
    assert law.loss(7e10, 1.4e12) == pytest.approx(published_loss(7e10, 1.4e12), rel=1e-5)


def test_intervals_hold_the_truth_and_grow_with_the_noise() -> None:
    random = Random(0)

    def width(noise: float) -> float:
        law = fit([Observation("", n, 20 * n, (1.8 + 800 / (120 * n * n) ** 0.17) * random.gauss(1, noise))
                   for n in (1e8, 2e8, 4e8, 8e8, 1.6e9, 3.2e9, 6.4e9)])  # fmt: skip
        assert isinstance(law, ScalingLaw) and law.form == "compute"
        low, high = law.intervals["alpha"]
        return high - low

    assert 0 < width(1e-4) < width(1e-2)


def test_a_law_is_refused_where_runs_do_not_tell_it() -> None:
    few = fit([Observation("", n, 20 * n, 3.0) for n in (1e8, 2e8)])
    assert isinstance(few, str) and "at least 4 sizes; finished are 2" in few
    flat = fit([Observation("", n, d, published_loss(n, d)) for n in (1e8, 1e9) for d in (1e9, 1e10, 1e11, 1e12)])
    assert isinstance(flat, str) and "at least 3 values of N" in flat


def test_without_validation_the_last_training_losses_count(tmp_path: Path) -> None:
    ladder = make_ladder(tmp_path)
    validated = observe(ladder)
    rows = [{"step": step, "loss": float(step), "tokens": 100 * step} for step in range(1, 51)]
    broken = [{"step": 51, "loss": None, "nonfinite": {"loss": "nan"}, "tokens": 5100}]
    RunFolder(ladder.run_dir(ladder.points[0])).metrics.write_text(
        "".join(json.dumps(row) + "\n" for row in rows + broken) + '{"s'
    )
    found = observe(ladder)
    assert (found[0].tokens, found[0].loss) == (5000, 50 - (LAST_ROWS - 1) / 2)
    for with_loss, without in zip(validated[1:], found[1:], strict=True):
        assert without.tokens == 3 * with_loss.tokens and without.loss == pytest.approx(with_loss.loss + 1)
