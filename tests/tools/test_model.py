"""`phalanx model` and the presets: exact totals from arithmetic, from names and shapes, and from the model as it is built."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from configs.load import load_config
from configs.model_schema import Model
from configs.sources import SHIPPED
from parallel.flops import count_parameters
from parallel.legality.verdict import check_config
from tools.cli import run
from tools.convert.hf_config.model_differences import model_differences
from tools.convert.hf_config.preset import interpret_config
from tools.convert.tensors.canonical_shapes import tensor_shapes

# Totals: without prediction depths and buffers.
GOLDEN = {
    "mixtral_8x7b": 46_702_792_704, "mixtral_8x22b": 140_620_634_112, "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560, "deepseek_v3": 671_026_404_352, "kimi_k2": 1_026_408_209_408,
    "kimi_k2_5": 1_026_408_209_408, "deepseek_v2": 235_741_434_880, "deepseek_v2_lite": 15_706_484_224,
    "glm_4_5": 352_797_814_784, "glm_4_6": 352_797_814_784, "gpt_oss_120b": 116_829_156_672, "gpt_oss_20b": 20_914_757_184,
    "olmoe_1b_7b": 6_919_161_856, "llama4_scout": 107_769_861_120, "qwen3_0_6b": 596_049_920, "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360, "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264, "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800, "gpt3_175b": 174_604_259_328, "llama3_8b": 8_030_261_248, "qwen3_1_7b": 1_720_574_976,
    "qwen2_5_7b": 7_615_616_512, "qwen2_5_72b": 72_706_203_648, "mistral_7b": 7_241_732_096, "phi_4": 14_659_507_200,
    "smollm3_3b": 3_075_098_624, "dots_llm1": 142_774_373_888, "glm_4_7_flash": 29_943_390_976, "minimax_m2": 228_689_748_992,
    "ernie_4_5_21b_a3b": 21_825_436_160, "ernie_4_5_300b_a47b": 299_484_160_000, "hy3_preview": 295_033_528_320,
    "hunyuan_a13b": 80_393_183_232,
    "qwen3_next_80b_a3b": 79_674_391_296, "qwen3_5_397b_a17b": 396_346_350_336, "qwen3_5_35b_a3b": 34_660_610_688,
    "qwen3_5_27b": 26_895_998_464, "deepseek_v3_2": 671_877_929_216, "glm_5": 743_911_199_232,
}  # fmt: skip
PLANNING_ONLY = {"grok_1"}
# Sparse attention: an indexer, which is counted and not built.
SPARSE = {"deepseek_v3_2": "deepseek_v32", "glm_5": "glm_moe_dsa"}
PRESETS = sorted(path.stem for path in (SHIPPED / "model").glob("*.yaml"))


def preset(name: str) -> Model:
    return load_config(f"model/{name}").config.model


def described(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run(["model", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_totals(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert described(capsys, name)["params_total"] == GOLDEN[name]


def test_active_in_three_conventions(capsys: pytest.CaptureFixture[str]) -> None:
    active = described(capsys, "deepseek_v3")["params_active"]
    assert active == {"all": 37_552_282_624, "without_input_embedding": 36_625_603_584, "non_embedding": 35_698_924_544}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny_moe"])
def test_presets_name_their_source_and_are_legal_or_say_why_not(name: str) -> None:
    config = load_config(f"model/{name}").config
    model = config.model
    assert model.source and model.name == name
    config.batch.seq_length_tokens = 2048
    problems = [problem for problem in check_config(config).problems if problem.path.startswith("model.")]
    if name in PLANNING_ONLY:
        assert model.planning_only and "planning" in problems[0].rule
    elif name in SPARSE:
        assert [problem.path for problem in problems] == ["model.dsa.top_k"] and not model.planning_only
    else:
        assert not problems and not model.planning_only


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in (*PLANNING_ONLY, "tiny_moe")])
def test_names_and_shapes_count_like_the_arithmetic(name: str) -> None:
    model = preset(name)
    model.vocab_multiple = 1
    counted = count_parameters(model, model.vocab_size or 0)
    shapes = {key: shape for key, shape in tensor_shapes(model).items() if not key.endswith("expert_bias")}
    assert sum(map(prod, shapes.values())) == counted.total + counted.mtp


def test_the_shipped_presets_are_tested() -> None:
    assert set(PRESETS) == {*GOLDEN, "tiny_moe", "grok_1", "gpt4_class"}


def test_grok_1_lacks_its_second_norms_only() -> None:
    # models.json of the reference counts four norms a layer, as its code has them.
    assert count_parameters(preset("grok_1"), 131072).total + 64 * 2 * 6144 == 315_684_820_992


def test_config_json_becomes_the_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": False, "invented_switch": 3,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    document = described(capsys, str(file))
    assert document["params_total"] == GOLDEN["qwen3_30b_a3b"]
    assert "invented_switch" in document["notes"][0]
    assert run(["model", str(file), "--to-yaml"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    mine, shipped = load_config(str(tmp_path / "mine.yaml")).config.model, preset("qwen3_30b_a3b")
    mine.name, mine.source = shipped.name, shipped.source
    # The shipped file has 12 digits of 0.001 * 8 / 48.
    assert mine.moe.router.aux_loss_coeff == pytest.approx(0.001 * 8 / 48, rel=1e-14)
    mine.moe.router.aux_loss_coeff = round(mine.moe.router.aux_loss_coeff, 15)
    assert mine == shipped


def test_what_cannot_be_converted_is_still_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 8,
        "topk_group": 3, "topk_method": "noaux_tc", "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "routed_scaling_factor": 16.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    document = described(capsys, str(tmp_path))
    assert document["params_total"] == GOLDEN["deepseek_v2"] and "knows no other" in document["planning_only"]


@pytest.mark.parametrize("name", SPARSE)
def test_transformers_builds_sparse_models_as_large(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' class with its default config, the published model's; and `phalanx model` of that config is the preset."""
    hf_config = CONFIG_MAPPING[SPARSE[name]]()
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(hf_config)
    assert sum(weight.numel() for weight in built.parameters()) == GOLDEN[name]
    values = hf_config.to_dict() | {"num_nextn_predict_layers": 1}
    if name == "deepseek_v3_2":
        values["rope_parameters"] = {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32,
            "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        }  # fmt: skip
    else:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(values))
    document = described(capsys, str(tmp_path))
    assert document["params_total"] == GOLDEN[name] and "indexer" in document["planning_only"]
    _, model, problems, _ = interpret_config(values)
    assert not problems and model_differences(preset(name), model) == []


@pytest.mark.parametrize(
    "keys",
    [{"indexer_types": ["full", "shared"] * 39}, {"indexer_types": None, "index_topk_pattern": "FFS"},
     {"indexer_types": None, "index_topk_freq": 4}],
)  # fmt: skip
def test_layers_that_share_an_indexer_are_refused(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_MAPPING["glm_moe_dsa"]().to_dict() | keys))
    assert run(["model", str(tmp_path)]) == 2
    assert list(keys)[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "nowhere"),
        (["/nowhere/config.json"], "config.json"),
        (["tiny_moe"], "model.vocab_size"),
        (["qwen3_8b", "--seq-length", "0"], "--seq-length"),
    ],
)
def test_bad_input(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", *words]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_v2_lite", "gpt_oss_20b", "qwen3_4b"])
def test_megatron_core_builds_as_many(name: str) -> None:
    """The real model on the meta device, its tables not padded."""
    from tools.convert.megatron_model import meta_parameters  # noqa: PLC0415  (megatron-core: 5 s that the others need not)

    model = preset(name)
    model.vocab_multiple = 1
    built = meta_parameters(model)
    shapes = {key: shape for key, shape in tensor_shapes(model).items() if not key.endswith("expert_bias")}
    assert built == {key: shape for key, shape in shapes.items() if not key.startswith("mtp.")}
    assert sum(map(prod, built.values())) == count_parameters(model, model.vocab_size or 0).total
    assert torch.empty(1).device.type == "cpu"
