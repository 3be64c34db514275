"""Every family: Hugging Face -> Phalanx -> Hugging Face bit for bit, and the same logits in Megatron-Core and transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from configs.errors import ConfigError
from configs.model_schema import Model
from parallel.flops import count_parameters
from tests.tools.convert.tiny import MODELS, make
from tools.convert.exporting import export_model
from tools.convert.families import FAMILIES, UNSUPPORTED, family_for, family_of
from tools.convert.hf_config.model_differences import model_differences
from tools.convert.hf_config.preset import interpret_config, read_config
from tools.convert.importing import import_model
from tools.convert.output_folder import WorkShare
from tools.convert.tensors.canonical_shapes import tensor_shapes
from tools.convert.verify import verify

ROOT = Path(__file__).resolve().parents[3]
IN_TRANSFORMERS = [family for family in FAMILIES if family.model_types[0] in CONFIG_MAPPING]


def run_import(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"dtype": "keep", "share": WorkShare(), "workers": 2, "force": False} | options
    return import_model(folder, out, **values)


def run_export(checkpoint: Path, out: Path, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"dtype": "keep", "share": WorkShare(), "workers": 2, "force": False} | options
    return export_model(checkpoint, out, **values)


def other_notes(done: dict[str, Any]) -> list[str]:
    """Notes but those on the coefficient of the load balancing loss, which have a test of their own."""
    return [note for note in done["notes"] if "router_aux_loss_coef" not in note]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(first: Path, second: Path) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_and_logits(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "hf")
    done = run_import(tmp_path / "hf", tmp_path / "checkpoint")
    assert done["finished"] and not other_notes(done)
    verdict = verify(tmp_path / "checkpoint", tmp_path / "hf", None, 2, 48, 1e-4)
    assert verdict["ok"] and verdict["max_abs_diff"] < 1e-4 and verdict["argmax_agreement"] == 1.0 and not verdict["notes"]
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "hf", tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    again, info = loaded
    assert not any(info.values()), info
    ids = torch.arange(24)[None] % 90
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, original(ids).logits)


def test_a_multimodal_folder_gives_its_language_model(tmp_path: Path) -> None:
    """Qwen3.5's published folders: other names, a vision tower, and a part of a prediction depth."""
    make("qwen3_5_moe", tmp_path / "hf")

    def as_published(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if name.startswith("model.")]:
            held["model.language_model." + name.removeprefix("model.")] = held.pop(name)
        held["model.visual.pos_embed.weight"], held["mtp.fc.weight"] = torch.ones(4, 3), torch.ones(2, 2)

    folder = change(tmp_path / "hf", tmp_path / "published", as_published)
    text = read_config(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {}}))
    notes = other_notes(run_import(folder, tmp_path / "checkpoint"))
    assert sorted(note.split(",")[0] for note in notes) == [
        "left out: the layer of multi-token prediction",
        "left out: the vision tower",
    ]
    assert any("mtp.fc.weight" in note for note in notes)
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "hf", tmp_path / "out")


def test_a_slice_of_layers_is_verified_too(tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path / "hf")
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    verdict = verify(tmp_path / "checkpoint", tmp_path / "hf", 1, 1, 32, 1e-4)
    assert verdict["ok"] and verdict["layers"] == 1 and verdict["layers_total"] == 3


def change(folder: Path, copy: Path, edit: Any) -> Path:
    """A copy of a folder whose tensors went through `edit(dict)`."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    held = load_file(file)
    edit(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, file, metadata={"format": "pt"})
    return copy


def transpose(held: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    assert held[name].shape[0] == held[name].shape[1], "no shape tells"
    held[name] = held[name].T


def swap(held: dict[str, torch.Tensor]) -> None:
    head = "model.layers.1.mlp.experts.0."
    held[head + "gate_proj.weight"], held[head + "up_proj.weight"] = (
        held[head + "up_proj.weight"],
        held[head + "gate_proj.weight"],
    )


def drop(held: dict[str, torch.Tensor]) -> None:
    held["model.layers.1.mlp.gate.e_score_correction_bias"].zero_()


def exchange_experts(held: dict[str, torch.Tensor]) -> None:
    for part in ("gate", "up", "down"):
        one, two = (f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in (0, 1))
        held[one], held[two] = held[two], held[one]


FAULTS = [("llama", transpose), ("qwen3_moe", swap), ("deepseek_v3", drop), ("glm4_moe", drop), ("glm4_moe", exchange_experts)]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_planted_faults_are_caught(name: str, fault: Any, tmp_path: Path) -> None:
    layers: dict[str, Any] = {"mlp_only_layers": []} if name == "qwen3_moe" else {}
    make(name, tmp_path / "hf", **layers)
    run_import(change(tmp_path / "hf", tmp_path / "faulty", fault), tmp_path / "checkpoint")
    verdict = verify(tmp_path / "checkpoint", tmp_path / "hf", None, 2, 48, 1e-3)
    assert not verdict["ok"] and verdict["max_abs_diff"] > 0.05


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_wrong_setting_is_caught(key: str, tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "faulty")
    config = read_config(tmp_path / "hf")
    if key == "rope_theta":
        config["rope_parameters"]["rope_theta"] = 1e4
    else:
        config[key] = 1e-2
    (tmp_path / "faulty" / "config.json").write_text(json.dumps(config))
    run_import(tmp_path / "faulty", tmp_path / "checkpoint")
    verdict = verify(tmp_path / "checkpoint", tmp_path / "hf", None, 2, 48, 1e-3)
    assert not verdict["ok"] and verdict["notes"]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_stacked_experts_are_read_too(name: str, tmp_path: Path) -> None:
    """transformers 5 also writes experts as it holds them: [E, 2I, H] and [E, H, I]."""
    model = make(name, tmp_path / "hf")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    run_import(tmp_path / "stacked", tmp_path / "checkpoint")
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "hf", tmp_path / "out")


def with_prediction_depth(folder: Path, name: str) -> None:
    """Give a tiny model the layer that transformers drops: its decoder layer and what stands around it."""
    config = read_config(folder)
    layer, hidden = config["num_hidden_layers"], config["hidden_size"]
    config["mtp_num_hidden_layers" if name.startswith("qwen3_5") else "num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    held = tensors(folder)
    last = f"model.layers.{layer - 1}."
    extra = {n.replace(last, f"model.layers.{layer}."): t.flip(0).clone() for n, t in held.items() if n.startswith(last)}
    head = f"model.layers.{layer}."
    generator = torch.Generator().manual_seed(3)
    extra |= {head + f"{norm}.weight": torch.rand(hidden, generator=generator) for norm in ("enorm", "hnorm", "shared_head.norm")}
    extra[head + "eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator)
    extra[head + "embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
    extra[head + "shared_head.head.weight"] = held.get("lm_head.weight", held["model.embed_tokens.weight"]).clone()
    if name.startswith("qwen3"):
        named = {
            f"{head}enorm.": "mtp.pre_fc_norm_embedding.", f"{head}hnorm.": "mtp.pre_fc_norm_hidden.",
            f"{head}eh_proj.": "mtp.fc.", f"{head}shared_head.norm.": "mtp.norm.", head: "mtp.layers.0.",
        }  # fmt: skip
        extra = {n: t for n, t in extra.items() if not n.endswith(("embed_tokens.weight", "shared_head.head.weight"))}
        for old, new in named.items():
            extra = {n.replace(old, new): t for n, t in extra.items()}
    save_file(held | extra, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "glm4_moe_lite", "qwen3_next", "qwen3_5_moe", "qwen3_5"])
def test_prediction_depths_are_kept(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "hf")
    with_prediction_depth(tmp_path / "hf", name)
    assert not other_notes(run_import(tmp_path / "hf", tmp_path / "checkpoint"))
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "hf", tmp_path / "out")
    verdict = verify(tmp_path / "checkpoint", tmp_path / "hf", None, 1, 24, 1e-4)
    assert verdict["ok"] and verdict["mtp_layers_compared"] == 1 and not verdict["notes"]
    assert verdict["mtp_max_abs_diff"] < 1e-4
    (note,) = verify(tmp_path / "checkpoint", tmp_path / "hf", 1, 1, 24, 1e-4)["notes"]
    assert "not compared: the 1 prediction depths" in note and "--layers" in note


def test_the_files_say_that_there_is_a_depth_where_config_json_has_no_key(tmp_path: Path) -> None:
    """Qwen3-Next's published config.json."""
    make("qwen3_next", tmp_path / "hf")
    with_prediction_depth(tmp_path / "hf", "qwen3_next")
    config = read_config(tmp_path / "hf")
    del config["num_nextn_predict_layers"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert not other_notes(run_import(tmp_path / "hf", tmp_path / "checkpoint"))
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "hf", tmp_path / "out")
    assert read_config(tmp_path / "out")["num_nextn_predict_layers"] == 1


def test_a_fault_in_a_prediction_depth_is_found(tmp_path: Path) -> None:
    """The model's own logits are right, those of the depth are not."""
    make("deepseek_v3", tmp_path / "hf")
    with_prediction_depth(tmp_path / "hf", "deepseek_v3")
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    layer = read_config(tmp_path / "hf")["num_hidden_layers"]
    swapped = f"model.layers.{layer}.eh_proj.weight"
    other = change(tmp_path / "hf", tmp_path / "other", lambda held: held[swapped].copy_(held[swapped].roll(1, 1)))
    verdict = verify(tmp_path / "checkpoint", other, None, 1, 24, 1e-4)
    assert not verdict["ok"] and verdict["max_abs_diff"] < 1e-4 < 1e-2 < verdict["mtp_max_abs_diff"]


def test_prediction_depths_that_are_missing_are_said(tmp_path: Path) -> None:
    make("glm4_moe", tmp_path / "hf", num_nextn_predict_layers=1)
    (note,) = run_import(tmp_path / "hf", tmp_path / "checkpoint")["notes"]
    assert "imported without MTP" in note


def test_a_repeated_table_that_differs_is_refused(tmp_path: Path) -> None:
    make("glm4_moe", tmp_path / "hf")
    with_prediction_depth(tmp_path / "hf", "glm4_moe")
    edited = change(tmp_path / "hf", tmp_path / "other", lambda held: held["model.layers.2.embed_tokens.weight"][3].add_(1))
    with pytest.raises(ConfigError, match=r"must equal model\.embed_tokens\.weight"):
        run_import(edited, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", MODELS)
def test_config_json_both_ways(name: str, tmp_path: Path) -> None:
    model_type, values = MODELS[name]
    config_class: Any = CONFIG_MAPPING[model_type]
    config_class(**values, pad_token_id=0).save_pretrained(tmp_path)
    family, model, problems, notes = interpret_config(read_config(tmp_path))
    assert not problems and not other_notes({"notes": notes})
    theirs = family.to_hf_config(model)
    again, problems = family.to_model(theirs)
    assert not problems and not model_differences(model, again)
    # Readers older than transformers 5 know the legacy keys only.
    legacy = {key: value for key, value in theirs.items() if key != "rope_parameters"}
    again, problems = family.to_model(legacy)
    assert not problems and not model_differences(model, again)
    # Phi-3 is a Mistral, and Hunyuan 3 a GLM-4.5, with other names in its files.
    assert family_for(model).name == {"phi3": "mistral", "hy_v3": "glm4_moe"}.get(family.name, family.name)


@pytest.mark.parametrize("family", IN_TRANSFORMERS, ids=lambda family: family.name)
def test_absent_keys_mean_what_transformers_takes(family: Any) -> None:
    """A config.json with nothing but its required keys reads like the config class with its defaults."""
    full = CONFIG_MAPPING[family.model_types[0]]().to_dict()
    model, _ = family.to_model({**full, "num_experts_per_tok": full.get("num_experts_per_tok") or 2})
    for setting in family.settings:
        default = getattr(setting, "default", None)
        names = setting.names()
        if not names or type(default) not in (int, float, bool):
            continue
        stated = next((full[name] for name in names if name in full), default)
        assert default == stated, names
    assert isinstance(model, Model)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "llama"])
def test_widths_that_the_model_leaves_out_are_written(name: str) -> None:
    """transformers has no default that means four times the hidden size."""
    model, _ = family_of({"model_type": name}).to_model(MODELS[name][1])
    model.ffn_hidden_size = model.moe.ffn_hidden_size = None
    config = family_for(model).to_hf_config(model)
    keys = {"intermediate_size", "moe_intermediate_size"} & config.keys()
    assert keys and all(config[key] == 4 * model.hidden_size for key in keys)


@pytest.mark.parametrize("family", IN_TRANSFORMERS, ids=lambda family: family.name)
def test_other_names_of_a_key_are_read(family: Any) -> None:
    """The configuration class takes some keys by two names. Top-k by the other name has no shape that would tell."""
    config_class: Any = CONFIG_MAPPING[family.model_types[0]]
    for alias, key in config_class.attribute_map.items():
        if key not in family.known() or key == "qk_rope_head_dim":
            continue
        full = config_class().to_dict() | {"num_experts_per_tok": 3} | {key: 3}
        named = {name: value for name, value in full.items() if name != key} | {alias: 3}
        assert alias in family.known() and family.to_model(full)[0] == family.to_model(named)[0], alias


def test_shapes_count_like_the_arithmetic() -> None:
    for family in IN_TRANSFORMERS:
        if family.planning_only:
            continue
        full = CONFIG_MAPPING[family.model_types[0]]().to_dict()
        full |= {"num_hidden_layers": 2, "num_experts_per_tok": full.get("num_experts_per_tok") or 2, "moe_intermediate_size": 64}
        full.pop("layer_types", None)
        model, _ = family.to_model(full)
        model.vocab_multiple = 1
        shapes = {name: shape for name, shape in tensor_shapes(model).items() if not name.endswith("expert_bias")}
        counted = count_parameters(model, model.vocab_size or 0)
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == counted.total + counted.mtp, family.name


REFUSED = [
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "knows no other"),
    ("deepseek_v2", {"n_group": 3, "topk_group": 2}, "where there are groups"),
    ("deepseek_v3", {"norm_topk_prob": False}, "always normalises"),
    ("deepseek_v3", {"rope_interleave": False}, "neighbouring pairs"),
    ("deepseek_v3", {"head_dim": 4}, "qk_rope_head_dim = 6"),
    ("glm4_moe", {"n_group": 0}, "at least 1"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 5.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, "at most high"),
    ("llama4", {"num_experts_per_tok": 2}, "weights the input of one expert"),
    ("olmo3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "other bases"),
    ("llama4", {"layer_types": ["chunked_attention"]}, "each of the 4 layers"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 8.0}}, "can build no other"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type"),
    ("mixtral", {"rope_scaling": {"rope_type": "default"}}, "rope_scaling too"),
    ("llama", {"attention_bias": True}, "one switch"),
    ("llama", {"hidden_act": "gelu"}, "SwiGLU"),
    ("llama", {"num_key_value_heads": 0}, "at least 1"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "can build no other"),
    ("glm4_moe_lite", {"mlp_layer_types": None, "first_k_dense_replace": 2}, "state mlp_layer_types"),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "each of the 3 layers"),
    ("minimax_m2", {"rotary_dim": 6}, "partial_rotary_factor"),
    ("minimax_m2", {"rope_parameters": {"rope_theta": 1e4}, "rotary_dim": 9}, "rotated part of head_dim = 8"),
    ("dots1", {"norm_topk_prob": None}, "always normalises"),
    ("ernie4_5_moe", {"use_bias": True}, "biases"),
    ("ernie4_5_moe", {"moe_layer_interval": 0}, "which layers have experts"),
    ("ernie4_5_moe", {"num_nextn_predict_layers": 1}, "no code for its prediction depth"),
    ("smollm3", {"no_rope_layers": [1, 1]}, "each of the 4 layers"),
    ("exaone_moe", {"sliding_window_pattern": "LLG"}, "which layers have the window"),
    ("exaone_moe", {"sliding_window": None}, "must be a number"),
    ("olmoe", {"clip_qkv": 8.0}, "clipped"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "Ministral"),
    ("qwen2_moe", {"use_sliding_window": True}, "which layers have the window"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window on"),
    ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 1}, "which layers have the window"),
    ("qwen3_moe", {"num_experts": 6, "num_local_experts": 4}, "must agree"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention"] * 3},
     "which layers have the window"),
    ("llama", {"is_causal": False}, "attends to later ones"),
    ("llama", {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}, "differ from layer to layer"),
    ("ernie4_5_moe", {"num_experts_per_tok": 2}, "must agree"),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "must be default"),
    ("olmo3", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "truncate": False}}},
     "both kinds of layers"),
    ("hunyuan_v1_moe", {"rope_scaling": "dynamic"}, "must be one mapping"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "clamp"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "each of the 2 layers"),
    ("gpt_oss", {"rope_parameters": None}, "must be stated"),
    ("gpt_oss", {"experts_per_token": 3}, "must repeat"),
    ("qwen3_yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "attention_factor": 0.5}},
     "at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_would_be_silently_wrong_is_refused(name: str, changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    model_type, values = MODELS[name]
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": model_type, **values, **changed}))
    with pytest.raises(ConfigError, match=words):
        run_import(tmp_path, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_the_docs_name_every_family() -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for model_type in (model_type for family in FAMILIES for model_type in family.model_types):
        assert any(f"`{model_type}`" in row for row in rows), model_type
    assert all(f"`{model_type}` | {why} |" in text for model_type, why in UNSUPPORTED.items())
    converted = sum(family.planning_only is None for family in FAMILIES)
    assert f"conversion of {converted} [families]" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_a_family_that_can_not_be_built_says_why(model_type: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(UNSUPPORTED[model_type])):
        family_of({"model_type": model_type})


def test_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean qwen3_moe"):
        family_of({"model_type": "qwen3_mo"})
