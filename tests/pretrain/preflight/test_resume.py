"""What `phalanx check` says about a run folder before anything is launched into it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from configs.load import load_config, to_yaml
from configs.schema import Config
from parallel.layout import make_layout
from pretrain.checkpoint.allowed_changes import architecture
from pretrain.checkpoint.manifest import Manifest
from pretrain.data.tokenizer import load_tokenizer, section_for
from pretrain.preflight.resume import (
    BIT_EQUAL,
    FRESH_OPTIMIZER,
    ONE_ULP,
    OTHER_RUN,
    REHEARSED,
    ResumePoint,
    check_warm_start,
    find_resume_point,
)
from pretrain.preflight.verdict import preflight
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.folder import COMPLETE, folder_of

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


def write_checkpoint(config: Config, step: int) -> None:
    """A checkpoint as a run with this config would have saved it."""
    folder = folder_of(config).checkpoints / f"step_{step:07d}"
    folder.mkdir(parents=True)
    data = {"seq_length_tokens": config.batch.seq_length_tokens, "train": [{"name": "train", "weight": 1.0}]}
    degrees, model = make_layout(config).degrees(), architecture(config.model, VOCAB)
    manifest = Manifest(
        1, step, 8 * step, 1024 * step, step, None, "megatron", 1, degrees, model, VOCAB, None, data, asdict(config), ("weight",),
        {}, {}, 4,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.as_json())
    (folder / COMPLETE).touch()


def point_of(config: Config) -> tuple[ResumePoint, list[str]]:
    point, problems, notices = find_resume_point(config, make_layout(config), VOCAB)
    assert point is not None and not problems, problems
    return point, [notice.text for notice in notices]


def test_what_changes_what_is_learned_is_no_bit_for_bit(config: Config) -> None:
    write_checkpoint(config, 8)
    config.checkpoint.allow_change = ["optimizer", "data", "batch"]
    assert point_of(config)[0].exactness == BIT_EQUAL
    config.optimizer.lr *= 2
    assert point_of(config)[0].exactness == f"{OTHER_RUN}: optimizer.lr"
    config.optimizer.lr /= 2
    config.optimizer.kind = "muon"
    assert point_of(config)[0].exactness == f"{FRESH_OPTIMIZER}: optimizer.kind"
    config.optimizer.kind = "adamw"
    config.data.train[0].weight = 3.0
    assert point_of(config)[0].exactness == f"{OTHER_RUN}: data.train"
    config.data.train[0].weight = 1.0
    config.batch.micro_batch_seqs = 2
    text = "the sequences that aux_loss balances at once (4 -> 2)"
    assert point_of(config)[0].exactness == f"{OTHER_RUN}: {text}"
    config.batch.micro_batch_seqs = 4
    config.batch.seq_length_tokens = 64
    point, (notice,) = point_of(config)
    assert point.exactness == f"{OTHER_RUN}: batch.seq_length_tokens"
    assert "was 128 in the checkpoint: the documents are cut into other samples" in notice


def test_another_cut_of_a_loss_that_does_not_depend_on_it(config: Config) -> None:
    config.model.moe.router.balance = "seq_aux_loss"
    (folder_of(config).path / "config.yaml").write_text(to_yaml(config))
    write_checkpoint(config, 8)
    assert point_of(config)[0].exactness == BIT_EQUAL
    config.batch.micro_batch_seqs = 2
    assert point_of(config)[0].exactness == REHEARSED


def test_going_back_says_what_will_happen(config: Config) -> None:
    for step in (8, 9):
        write_checkpoint(config, step)
    config.checkpoint.resume_step = 8
    point, notices = point_of(config)
    assert (point.step, point.set_aside, notices) == (8, (9,), [])
    assert point.describe().endswith("The run goes back: its checkpoints of steps 9 are set aside as .rolled_back")
    config.checkpoint.resume_step = 5
    _, (problem,), _ = find_resume_point(config, make_layout(config), VOCAB)
    assert (problem.path, problem.got) == ("checkpoint.resume_step", 5) and "steps 9, 8, 7" in problem.fix
    folder = folder_of(config)
    for kind, fields in (
        (EventKind.ATTEMPT, {"wandb_id": "", "logs": None, "slurm_job": None, "resume_step": 8}),
        (EventKind.WENT_BACK, {"from_step": 9, "to_step": 8, "consumed_samples": 64, "checkpoints": [], "wandb_id": "x"}),
    ):
        append_event(folder, 2, kind, **fields)
    config.checkpoint.resume_step = 8
    point, (notice,) = point_of(config)
    assert (point.step, point.set_aside) == (9, ())
    assert "went back to step 8 before, and goes on from its newest checkpoint since then, step 9" in notice


def test_a_step_to_go_back_to_in_a_new_folder_is_refused(config: Config, tmp_path: Path) -> None:
    config.run.dir, config.checkpoint.resume_step = str(tmp_path / "new"), 3
    _, (problem,), _ = find_resume_point(config, make_layout(config), VOCAB)
    assert problem.path == "checkpoint.resume_step" and "steps none" in problem.fix


def test_what_the_ranks_would_refuse_is_said_before(config: Config) -> None:
    config.optimizer.lr, config.model.hidden_size = 1.0, 256
    _, problems, _ = find_resume_point(config, make_layout(config), VOCAB)
    assert sorted(problem.path for problem in problems) == ["model.hidden_size", "optimizer.lr"]


def test_damage_and_an_empty_folder(config: Config, tmp_path: Path) -> None:
    manifest = tmp_path / "run" / "checkpoints" / "step_0000007" / "manifest.json"
    manifest.write_text("{")
    point, problems, notices = find_resume_point(config, make_layout(config), VOCAB)
    assert point is None and "none of them is whole" in problems[0].rule
    assert "damaged" in notices[0].text
    manifest.write_text(json.dumps({"format": 9}))
    point, problems, notices = find_resume_point(config, make_layout(config), VOCAB)
    assert point is None and not notices
    assert "this config and version can't go on from" in problems[0].rule
    config.run.dir = str(tmp_path / "new")
    assert find_resume_point(config, make_layout(config), VOCAB) == (None, [], [])


def test_the_checkpoint_of_a_warm_start_is_looked_at(config: Config, folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(section_for(str(folder / "tok.model")))
    run = config.run.dir
    config.run.dir = str(tmp_path / "new")
    for named in (None, run, f"{run}/checkpoints", f"{run}/checkpoints/step_0000007"):
        config.checkpoint.load = named
        assert not check_warm_start(config, VOCAB, tokenizer)
    config.model.hidden_size *= 2
    (problem,) = check_warm_start(config, VOCAB, tokenizer)
    assert problem.path == "model.hidden_size" and "as in the checkpoint" in problem.rule
    config.checkpoint.load = str(tmp_path / "nowhere")
    (problem,) = check_warm_start(config, VOCAB, tokenizer)
    assert problem.path == "checkpoint.load" and "complete checkpoint" in problem.rule


def test_the_verdict_names_a_checkpoint_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    words = [
        f"data.tokenizer.path={folder / 'tok.model'}",
        f"data.train=[{{path: {folder / 'embedded'}}}]",
        f"run.dir={tmp_path}/new",
    ]
    config = load_config("quickstart", [*words, f"checkpoint.load={tmp_path}/nowhere"]).config
    assert [problem.path for problem in preflight(config, with_data=True).problems] == ["checkpoint.load"]
    assert not preflight(config, with_data=False).problems
