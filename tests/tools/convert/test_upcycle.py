"""A dense model becomes an MoE model with the same logits, in every family that can hold one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from configs.load import load_config
from pretrain.checkpoint.tensor_file import read_header
from tests.tools.convert.test_families import run_export, tensors
from tests.tools.convert.tiny import logits_by_transformers, make
from tools.cli import run as run_command
from tools.convert.output_folder import WorkShare
from tools.convert.upcycle import Recipe, upcycle
from tools.convert.verify import verify

# dense model, recipe, family of the result, experts and top-k of the result
CASES = [
    ("llama", Recipe(4, 2), "mixtral", 4, 2),
    ("olmo2", Recipe(3, 2), "flex_olmo", 3, 2),
    ("mistral", Recipe(3, 2, granularity=4), "mixtral", 12, 8),
    ("qwen2", Recipe(4, 2, shared_expert=True), "qwen2_moe", 4, 2),
    ("qwen3", Recipe(4, 1, granularity=2), "qwen3_moe", 8, 2),
    ("qwen3", Recipe(4, 2, granularity=2, shared_expert=True), "glm4_moe", 8, 4),
]


def run(folder: Path, out: Path, recipe: Recipe) -> dict[str, object]:
    return upcycle(folder, out, recipe, "keep", WorkShare(), 2, False)


@pytest.mark.parametrize(("name", "recipe", "family", "experts", "top_k"), CASES)
def test_the_logits_stay(name: str, recipe: Recipe, family: str, experts: int, top_k: int, tmp_path: Path) -> None:
    make(name, tmp_path / "dense", intermediate_size=96)
    done = run(tmp_path / "dense", tmp_path / "moe", recipe)
    assert (done["family"], done["experts"], done["top_k"]) == (family, experts, top_k)
    verdict = verify(tmp_path / "moe", tmp_path / "dense", None, 2, 48, 1e-5)
    largest = verdict["max_abs_logit"]
    assert verdict["max_abs_diff"] < 1e-5 * max(1, largest / 4)
    run_export(tmp_path / "moe", tmp_path / "out")
    dense, moe = (logits_by_transformers(tmp_path / folder) for folder in ("dense", "out"))
    assert (dense - moe).abs().max() < 1e-5 * max(1, largest / 4)


def test_noise_tells_the_experts_apart(tmp_path: Path) -> None:
    make("llama", tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "moe", Recipe(3, 2, noise=0.01))
    run_export(tmp_path / "moe", tmp_path / "out")
    dense, moe = tensors(tmp_path / "dense"), tensors(tmp_path / "out")
    original = dense["model.layers.1.mlp.up_proj.weight"]
    copies = [moe[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"] - original for expert in range(3)]
    assert all(0.008 < float(copy.std()) < 0.012 for copy in copies)
    assert not torch.equal(copies[0], copies[1]) and torch.equal(
        moe["model.layers.1.self_attn.q_proj.weight"], dense["model.layers.1.self_attn.q_proj.weight"]
    )


def test_the_same_bytes_however_the_work_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama", tmp_path / "dense")
    recipe = Recipe(3, 2, granularity=2, noise=0.01)
    run(tmp_path / "dense", tmp_path / "one", recipe)
    monkeypatch.setattr("tools.convert.file_plan.UNIT_BYTES", 500)
    monkeypatch.setattr("tools.convert.file_plan.SMALL_BYTES", 0)
    run(tmp_path / "dense", tmp_path / "two", recipe)
    assert len(read_header(tmp_path / "one" / "part_00000.safetensors")) < len(
        read_header(tmp_path / "two" / "part_00000.safetensors")
    )
    for folder in ("one", "two"):
        run_export(tmp_path / folder, tmp_path / f"{folder}_out")
    one, two = tensors(tmp_path / "one_out"), tensors(tmp_path / "two_out")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_command_and_the_model_of_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("llama", tmp_path / "dense")
    words = ["--experts", "3", "--top-k", "2", "--granularity", "2", "--noise", "0.01", "--json"]
    assert run_command(["convert", "upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), *words]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["experts"] == 6 and "with noise the logits differ" in err
    model = load_config(str(tmp_path / "moe" / "model.yaml")).config.model
    assert (model.moe.num_experts, model.moe.top_k, model.moe.ffn_hidden_size) == (6, 4, 36)


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("mixtral", Recipe(4, 2), "must be dense"),
        ("llama", Recipe(1, 1), "must be at least 2"),
        ("llama", Recipe(4, 1), "would always weigh 1"),
        ("llama", Recipe(4, 2, granularity=7), "must divide the width of the MLP, 72"),
        ("qwen2", Recipe(4, 2), "without|with --shared-expert"),
    ],
)
def test_what_can_not_be_upcycled(name: str, recipe: Recipe, words: str, tmp_path: Path) -> None:
    make(name, tmp_path / "dense")
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "dense", tmp_path / "moe", recipe)
    assert not (tmp_path / "moe").exists()
