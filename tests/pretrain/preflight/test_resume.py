"""What `phalanx check` says about a run folder before anything is launched into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.load import load_config, to_yaml
from configs.schema import Config
from parallel.layout import make_layout
from pretrain.checkpoint.allowed_changes import architecture
from pretrain.checkpoint.manifest import Manifest
from pretrain.preflight.resume import BIT_EQUAL, ONE_ULP, REHEARSED, find_resume_point
from pretrain.run.folder import COMPLETE

VOCAB = 500


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run folder with a checkpoint of step 7, written by the quickstart's layout."""
    made = load_config("quickstart", [f"run.dir={tmp_path / 'run'}", f"model.vocab_size={VOCAB}"]).config
    folder = tmp_path / "run" / "checkpoints" / "step_0000007"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(made))
    manifest = Manifest(
        1, 7, 56, 7168, 7, None, "megatron", 1, make_layout(made).degrees(), architecture(made.model, VOCAB), VOCAB, None, None,
        {}, ("weight",), {}, {}, 4,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.as_json())
    (folder / COMPLETE).touch()
    return made


def exactness(config: Config) -> str:
    point, problems, _ = find_resume_point(config, make_layout(config), VOCAB)
    assert point is not None and point.step == 7 and not problems
    assert point.written_by == "pp2·ep2·dp2, megatron ZeRO-1"
    return point.exactness


def test_each_change_of_layout_has_its_promise(config: Config) -> None:
    assert exactness(config) == BIT_EQUAL
    config.zero.engine, config.zero.stage = "deepspeed", 2
    assert exactness(config) == ONE_ULP
    config.parallel.pipeline = 1
    assert exactness(config) == ONE_ULP
    config.parallel.tensor = 2
    assert exactness(config) == REHEARSED


def test_what_the_ranks_would_refuse_is_said_before(config: Config) -> None:
    config.optimizer.lr, config.model.hidden_size = 1.0, 256
    _, problems, _ = find_resume_point(config, make_layout(config), VOCAB)
    assert sorted(problem.path for problem in problems) == ["model.hidden_size", "optimizer.lr"]


def test_damage_and_an_empty_folder(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_0000007" / "manifest.json").write_text(json.dumps({"format": 9}))
    point, problems, notices = find_resume_point(config, make_layout(config), VOCAB)
    assert point is None and not problems
    assert "damaged" in notices[0].text
    config.run.dir = str(tmp_path / "new")
    assert find_resume_point(config, make_layout(config), VOCAB) == (None, [], [])
