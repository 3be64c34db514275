"""The resume table: what may change between attempts."""

from __future__ import annotations

import pytest

from configs.fields import walk
from configs.schema import Config
from pretrain.checkpoint.allowed_changes import (
    FREE,
    REFUSED,
    WORD,
    architecture,
    check_changes,
    check_data_change,
    flatten,
    rule_of,
)


def test_every_key_has_a_rule() -> None:
    rules = {path: rule_of(path) for path, _, _ in walk(Config())}
    assert set(rules.values()) == {FREE, WORD, REFUSED}


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("parallel.tensor", FREE), ("zero.engine", FREE), ("run.steps", FREE), ("batch.micro_batch_seqs", FREE),
        ("metrics.wandb.project", FREE), ("data.train[0].path", FREE), ("optimizer.lr", WORD), ("schedule.kind", WORD),
        ("batch.global_batch_seqs", WORD), ("run.seed", WORD), ("precision.params", WORD), ("model.num_layers", REFUSED),
        ("model.moe.router.score", REFUSED), ("model.position.interleaved", REFUSED),
        ("model.position.theta", WORD), ("model.moe.router.aux_loss_coeff", WORD),
    ],
)  # fmt: skip
def test_the_rule_of_each_key(key: str, rule: str) -> None:
    assert rule_of(key) == rule


def test_changes_are_reported_all_at_once_and_allow_change_permits_them() -> None:
    before = flatten(Config())
    config = Config()
    config.parallel.tensor = 2
    config.optimizer.lr = 1.0
    config.schedule.kind = "linear"
    config.model.num_layers = 9
    problems = check_changes(before, config)
    assert [problem.path for problem in problems] == ["model.num_layers", "optimizer.lr", "schedule.kind"]
    assert "checkpoint.allow_change=[optimizer.lr]" in problems[1].fix
    config.checkpoint.allow_change = ["optimizer", "schedule.kind", "model"]
    assert [problem.path for problem in check_changes(before, config)] == ["model.num_layers"], "no word for another model"


def test_a_rotary_context_may_grow_with_allow_change_and_a_learned_one_never() -> None:
    before = flatten(Config())
    config = Config()
    config.model.max_position_tokens, config.model.position.theta = 4096, 5e5
    config.model.position.scaling.kind = "yarn"
    changed = ["model.max_position_tokens", "model.position.scaling.kind", "model.position.theta"]
    assert [problem.path for problem in check_changes(before, config)] == changed
    assert set(architecture(config.model, 100).items()) - set(architecture(Config().model, 100).items()), "manifests keep them"
    config.checkpoint.allow_change = ["model.position", "model.max_position_tokens"]
    assert check_changes(before, config) == []
    before["model.position.kind"] = config.model.position.kind = "learned"
    (problem,) = check_changes(before, config)
    assert problem.path == "model.max_position_tokens" and "another architecture" in problem.rule


def test_architecture_is_what_weights_depend_on() -> None:
    one, other = Config(), Config()
    other.model.name = "another label"
    other.model.hidden_dropout = 0.1
    assert architecture(one.model, 100) == architecture(other.model, 100)
    assert architecture(one.model, 100) != architecture(one.model, 101)
    other.model.attention.qk_norm = True
    assert architecture(one.model, 100) != architecture(other.model, 100)


def test_data_is_recognised_by_content() -> None:
    def identity(sha: str, weight: float = 1.0, name: str = "a") -> dict[str, object]:
        return {"valid_fraction": 0.0, "train": [{"name": name, "weight": weight, "num_tokens": 5, "idx_sha256": sha}]}

    config = Config()
    assert check_data_change(identity("x"), identity("x", name="moved"), config) == []
    assert check_data_change(None, identity("x"), config) == []
    assert [p.path for p in check_data_change(identity("x"), identity("y"), config)] == ["data.train"]
    assert check_data_change(identity("x"), identity("x", 2.0), config)
    config.checkpoint.allow_change = ["data"]
    assert check_data_change(identity("x"), identity("y"), config) == []
