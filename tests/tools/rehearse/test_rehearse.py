"""The rehearsal: shrinking keeps the kind, the covering set covers, a planted fault is caught and named."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import Config
from configs.sources import shipped_names
from parallel.compat.index import is_needed
from parallel.legality.verdict import check_config
from pretrain.engine.muon import Muon
from tools.planner.legal import ONLY_FOR_PLANS
from tools.rehearse import cli
from tools.rehearse.covering_layouts import covering_subset, legal_layouts, muon_variants
from tools.rehearse.local_ranks import RankFailed
from tools.rehearse.report import model_notes
from tools.rehearse.shrink import MAX_RANKS, QK_CLIP, common_divisors, fit_degrees, shrink

COMPOSED = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2", "launch.processes_per_node=4"]
QUICK = ["quickstart", "--steps", "2"]


def rehearse(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = cli.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_layout_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = rehearse([*QUICK, *COMPOSED], capsys)
    assert code == 0
    (line,) = found["layouts"]  # type: ignore[misc]
    assert line["ok"] and line["layout"] == "tp2·pp2·ep2" and line["loss_max_rel"] < 1e-5
    assert {"loss_max_rel", "grad_norm_max_rel", "grad_max_rel", "weight_max_rel", "engine", "zero"} <= set(line)


@pytest.mark.parametrize(
    ("target", "words", "named"),
    [
        # Expert gradients are not reduced over the tensor ranks that sent the tokens.
        ("pretrain.build.mark_expert_parameters", ["parallel.tensor=2"], "experts"),
        # Auxiliary losses weigh three times as much, or one and a half times.
        ("pretrain.model.megatron_config.router_loss_weight", ["parallel.tensor=2"], ""),
    ],
)
def test_a_planted_fault_is_caught_and_named(
    target: str, words: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(target, lambda first, *rest: 3 if getattr(first, "tensor", 1) > 1 else 1)
    layout = ["parallel.pipeline=1", "parallel.expert=1", "launch.processes_per_node=2", "zero.stage=0", *words]
    code, found = rehearse([*QUICK, "model.moe.router.aux_loss_coeff=0.5", *layout], capsys)
    (line,) = found["layouts"]  # type: ignore[misc]
    assert code == 1 and not line["ok"]
    assert named in line["first_difference"]


def test_recomputed_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """Layer norms, which megatron-core asks Transformer Engine about, and dense layers between MoE layers."""
    recompute = ["recompute={mode: selective, modules: [layernorm, mlp, moe]}", "model.moe.first_dense_layers=1"]
    code, found = rehearse([*QUICK, *recompute, "parallel.tensor=2"], capsys)
    assert code == 0, found


def test_a_model_that_does_not_run_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: object) -> None:
        raise RankFailed("rank 0: no")

    monkeypatch.setattr("tools.rehearse.rehearse.run_ranks", fail)
    assert cli.main(QUICK) == 1
    assert "the reference on one process FAILED\nrank 0: no" in capsys.readouterr().err


def test_what_depends_on_the_layout_by_nature_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    router = ["model.moe.router.jitter_eps=0.1", "model.moe.capacity_factor=1.5"]
    code, found = rehearse([*QUICK, *router, "parallel.pipeline=1", "launch.processes_per_node=2"], capsys)
    assert code == 0, found
    assert found["left_out"] == ["model.moe.capacity_factor", "model.moe.router.jitter_eps"]


ONE_RANK = ["parallel.pipeline=1", "parallel.expert=1", "zero.stage=0", "launch.processes_per_node=1"]
STRONG = "model.moe.router.aux_loss_coeff=0.5"


@pytest.mark.parametrize(
    ("balance", "references"), [("aux_loss", [1, 2, 4]), ("seq_aux_loss", [1, 1, 1]), ("global_aux_loss", [2, 4, 8])]
)
def test_another_cut_of_the_global_batch_gives_the_same_answer(
    balance: str, references: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the loss is not linear in the cut, the reference is cut alike; where it is, the reference takes single sequences."""
    two = ["parallel.pipeline=1", "launch.processes_per_node=2", f"model.moe.router.balance={balance}", STRONG]
    code, found = rehearse([*QUICK, *two, "--micro-batches", "1,2,4"], capsys)
    assert code == 0, found
    lines: Any = found["layouts"]
    assert [line["micro_batch_seqs"] for line in lines] == [1, 2, 4]
    assert [line["reference_micro_batch_seqs"] for line in lines] == references
    assert not found["left_out"]


def test_a_loss_that_depends_on_the_micro_batch_is_caught_on_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """megatron-core's own weight of the balance of sequences, which is wrong up to 0.18."""
    monkeypatch.setattr("pretrain.build.weigh_router_losses", lambda chunks: None)
    words = [*QUICK, *ONE_RANK, "model.moe.router.balance=seq_aux_loss", STRONG, "--micro-batches", "1,2"]
    code, found = rehearse(words, capsys)
    lines: Any = found["layouts"]
    is_wrong = is_needed("The balancing loss of sequences is weighted by the tokens of one sequence")
    assert code == is_wrong and [line["ok"] for line in lines] == [True, not is_wrong]


def test_a_balance_that_depends_on_the_data_ranks_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pretrain.build.weigh_router_losses", lambda chunks: None)
    words = ["parallel.pipeline=1", "launch.processes_per_node=2", "model.moe.router.balance=global_aux_loss", STRONG]
    code, found = rehearse([*QUICK, *words], capsys)
    lines: Any = found["layouts"]
    assert code == 1 and not lines[0]["ok"]


def test_micro_batches_that_no_rehearsal_has() -> None:
    with pytest.raises(ConfigError, match="--micro-batches = '1,3'"):
        cli.main([*QUICK, "--micro-batches", "1,3"])


def test_low_precision_is_rehearsed_in_fp32_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["precision={params: bf16, grads: bf16}", "zero={engine: deepspeed, stage: 2}", "parallel.pipeline=1"]
    code, found = rehearse([*QUICK, *words, "launch.processes_per_node=2"], capsys)
    assert code == 0, found
    assert found["replaced_by_fp32"] == {"precision.params": "bf16", "precision.grads": "bf16"}
    assert cli.main([*QUICK, *words, "launch.processes_per_node=2"]) == 0
    assert "in place of precision.params=bf16, precision.grads=bf16" in capsys.readouterr().out


def test_a_dispatcher_for_gpus_is_rehearsed_by_all_to_all_and_told() -> None:
    config = load_config("qwen3_30b_a3b", ["launch.target=local"]).config
    assert config.model.moe.dispatcher == "flex"
    assert shrink(config, common_divisors([config])).model.moe.dispatcher == "alltoall"
    assert any("in place of model.moe.dispatcher=flex" in note for note in model_notes(config))


def test_layouts_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layouts.json"
    path.write_text(json.dumps([{"parallel.context": 2, "parallel.pipeline": 1}, {"parallel.pipeline": 1, "zero.stage": 0}]))
    code, found = rehearse([*QUICK, "--layouts", str(path)], capsys)
    assert code == 0
    assert [line["layout"] for line in found["layouts"]] == ["cp2·ep2·dp2", "ep2·dp4"]  # type: ignore[attr-defined,index]


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("model/")])
@pytest.mark.parametrize("degrees", [(8, 1, 16, 4, 8, 1, 4096), (2, 2, 2, 1, 2, 2, 64), (1, 1, 8, 1, 64, 1, 2048)])
def test_shrinking_keeps_every_axis_and_the_kind_of_model(name: str, degrees: tuple[int, ...]) -> None:
    """Every shipped model, on layouts of up to 4,096 ranks."""
    config = load_config("quickstart").config
    config.model = load_config(name).config.model
    tensor, context, pipeline, virtual, expert, expert_tensor, world = degrees
    if not config.model.moe.num_experts:
        expert = expert_tensor = 1
    if config.model.mlp_bias or config.model.activation == "gpt_oss_glu":
        expert_tensor = 1
    parallel = config.parallel
    parallel.tensor, parallel.context, parallel.pipeline, parallel.virtual_pipeline = tensor, context, pipeline, virtual
    parallel.expert, parallel.expert_tensor = expert, expert_tensor
    config.launch.nodes, config.launch.processes_per_node = world // 8, 8
    fitted = fit_degrees(config)
    assert fitted.launch.processes_per_node <= MAX_RANKS
    for axis in ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor"):
        assert (getattr(fitted.parallel, axis) > 1) == (getattr(parallel, axis) > 1), axis
    small = shrink(fitted, common_divisors([fitted]))
    expected = ("data.train", *ONLY_FOR_PLANS)
    problems = [problem for problem in check_config(small).problems if problem.path not in expected]
    assert not problems, problems
    assert (small.model.moe.num_experts > 0) == (config.model.moe.num_experts > 0)
    assert small.model.hidden_size < 100


@pytest.fixture(scope="module")
def candidates() -> list[tuple[Any, Config]]:
    return list(legal_layouts(load_config("quickstart").config, 8))


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_the_covering_set_covers_every_legal_combination(strength: int, candidates: list[tuple[Any, Config]]) -> None:
    chosen = covering_subset(candidates, strength)

    def held(layouts: list[Any]) -> set[Any]:
        return {group for values, _ in layouts for group in combinations(values, strength)}

    assert held(chosen) == held(candidates)
    assert len(chosen) < len(candidates) / 4
    assert chosen == covering_subset(candidates, strength), "the same layouts every time"


@pytest.fixture
def torch_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded state is updated by torch's AdamW: DeepSpeed's takes a minute to compile."""
    monkeypatch.setattr("pretrain.engine.deepspeed_runtime.can_compile", lambda: False)


@pytest.mark.usefixtures("torch_adam")
def test_every_legal_pair_gives_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Both engines, all stages, offload, every axis: some 18 layouts of up to 4 ranks, which hold every pair that 8 hold."""
    code, found = rehearse([*QUICK, "--layouts", "auto", "--max-ranks", "4"], capsys)
    wrong = [line for line in found["layouts"] if not line["ok"]]  # type: ignore[attr-defined]
    assert code == 0, wrong


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("torch_adam")
def test_every_legal_triple_gives_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = rehearse([*QUICK, "--layouts", "auto", "--strength", "3"], capsys)
    assert code == 0, [line for line in found["layouts"] if not line["ok"]]  # type: ignore[attr-defined]


def test_every_legal_pair_is_one_of_four_ranks(candidates: list[tuple[Any, Config]]) -> None:
    pairs = {
        ranks: {
            pair for values, made in candidates if made.launch.processes_per_node <= ranks for pair in combinations(values, 2)
        }
        for ranks in (4, 8)
    }
    assert pairs[4] == pairs[8]


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_30b_a3b", "mixtral_8x7b", "gpt_oss_20b"])
def test_every_family_on_composed_axes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"base: [model/{name}, cluster/laptop]\nrun: {{steps: 3}}\n")
    code, found = rehearse([str(path), *COMPOSED, "zero.stage=1"], capsys)
    assert code == 0, found


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.tensor=3"],
        ["--layouts", "nowhere.json"],
        ["zero.stage=2"],
        # Nothing is wrong with what a rehearsal would run of it.
        ["zero={engine: deepspeed, stage: 0}", "precision.params=bf16"],
    ],
)
def test_what_is_refused_for_the_run_is_refused_here(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        cli.main([*QUICK, *words])


MUON = ["optimizer.kind=muon", "optimizer.muon.router=muon", "optimizer.muon.split_heads=head"]
SHARDED = ["parallel.tensor=2", "parallel.expert_tensor=2", "parallel.pipeline=1", "parallel.expert=1"]


@pytest.mark.parametrize(
    "words",
    [
        [*SHARDED, "zero.stage=1"],
        pytest.param([*COMPOSED, "launch.processes_per_node=8"], marks=pytest.mark.prove),
        [*SHARDED, "zero={engine: deepspeed, stage: 3, offload: optimizer}"],
        pytest.param([*SHARDED, "zero={engine: deepspeed, stage: 1, offload: optimizer}"], marks=pytest.mark.prove),
        pytest.param([*SHARDED, "zero={engine: deepspeed, stage: 2}"], marks=pytest.mark.prove),
        pytest.param([*SHARDED, "zero={engine: deepspeed, stage: 0}"], marks=pytest.mark.prove),
        pytest.param([*SHARDED, "zero.stage=0"], marks=pytest.mark.prove),
    ],
)
def test_muon_updates_alike_whatever_holds_the_matrices(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The small model's matrices would fit into one wave.
    monkeypatch.setattr(Muon.__init__, "__defaults__", (10_000,))
    code, found = rehearse([*QUICK, *MUON, *words], capsys)
    assert code == 0, found


def test_matrices_that_each_rank_orthogonalises_for_itself_are_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each tensor rank solves its own rows, as megatron-core's mode `blockwise` does."""

    def by_rank(name: str, num_rows: int, *_: object) -> list[tuple[tuple[int, int], ...]]:
        parts = dist.get_world_size()
        return [((part * num_rows // parts, (part + 1) * num_rows // parts),) for part in range(parts)]

    monkeypatch.setattr("pretrain.engine.muon.split_rows", by_rank)
    code, found = rehearse([*QUICK, *MUON, *SHARDED, "launch.processes_per_node=2"], capsys)
    (line,) = found["layouts"]  # type: ignore[misc]
    assert code == 1 and not line["ok"] and line["grad_max_rel"] < 1e-5 < line["weight_max_rel"]


def test_muon_and_qk_clip_are_axes_of_the_covering_layouts() -> None:
    splits = {"none", "qkv", "head"}
    muon = ["optimizer.kind=muon"]
    config = load_config("quickstart", [*muon, "model.attention.qk_norm=false"]).config
    layouts = [layout.optimizer.muon for _, layout in legal_layouts(config, 1)]
    assert {(layout.split_heads, layout.qk_clip) for layout in layouts} == {(s, clip) for s in splits for clip in (None, QK_CLIP)}
    # The norms of queries and keys make QK-clip illegal.
    clips = [dict(values)["qk_clip"] for values in muon_variants(load_config("quickstart", muon).config)]
    assert clips == [None] * 3
    assert list(muon_variants(load_config("quickstart").config)) == [()]


@pytest.mark.parametrize(
    "words",
    [
        ["model.attention.qkv_bias=true", "parallel.tensor=2", "zero.stage=1"],
        pytest.param(["parallel.tensor=4", "launch.processes_per_node=8"], marks=pytest.mark.prove),
        pytest.param([*SHARDED, "zero={engine: deepspeed, stage: 2, offload: optimizer}"], marks=pytest.mark.prove),
    ],
)
def test_qk_clip_clips_alike_under_any_layout(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    clip = ["model.attention.qk_norm=false", "optimizer={kind: muon, muon: {qk_clip: 100}}"]
    code, found = rehearse([*QUICK, *clip, *words], capsys)
    assert code == 0, found
    (line,) = found["layouts"]  # type: ignore[misc]
    assert line["muon"] == {"split_heads": "qkv", "qk_clip": 100.0}
