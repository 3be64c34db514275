"""Legal configs that few models have, each as silently wrong when misread: bit for bit both ways, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from configs.errors import ConfigError
from tests.tools.convert.test_families import assert_same_bits, run_export, run_import, tensors, with_prediction_depth
from tests.tools.convert.tiny import LLAMA3, MODELS, YARN, logits_by_transformers, make, randomize
from tools.convert.families import family_named
from tools.convert.hf_config.preset import read_config
from tools.convert.verify import verify
from tools.inference.generate import generate
from tools.inference.generate_exported import generate_exported, load_exported

WINDOW, FULL = "sliding_attention", "full_attention"
# 400 tokens: with the tiny models' 16 YaRN's correction range is empty.
LONG = YARN | {"original_max_position_embeddings": 400}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn over half a head": ("glm4_moe", {"rope_parameters": LONG | {"partial_rotary_factor": 0.5}, "head_dim": 16}),
    "attention_factor": ("qwen3", {"rope_parameters": LONG | {"attention_factor": 1.3}}),
    "mscale_all_dim alone": ("deepseek_v3", {"rope_parameters": LONG | {"mscale_all_dim": 0.7}}),
    "attention_factor over mscale": (
        "deepseek_v2", {"rope_parameters": LONG | {"mscale": 0.7, "mscale_all_dim": 0.4, "attention_factor": 1.1}},
    ),
    "windows in some layers": (
        "qwen3", {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 4,
                  "layer_types": [WINDOW, FULL, FULL, WINDOW]},
    ),
    "windows in the last layers": ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "windows in all layers": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9}),
    "windows in even layers": ("gpt_oss", {"layer_types": None, "num_hidden_layers": 3}),
    "no windows": ("gpt_oss", {"layer_types": [FULL, FULL]}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "every group": ("deepseek_v3", {"n_routed_experts": 12, "n_group": 4, "topk_group": 4, "num_experts_per_tok": 3}),
    "a group scored by its best expert": (
        "deepseek_v2", {"topk_method": "group_limited_greedy", "n_routed_experts": 12, "n_group": 4, "topk_group": 2,
                        "num_experts_per_tok": 4},
    ),
    "a group scored by its best two": ("deepseek_v3", {"n_routed_experts": 12, "n_group": 4, "topk_group": 2,
                                                       "num_experts_per_tok": 3}),
    "llama3 over another context": (
        "llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 300, "low_freq_factor": 1.5}},
    ),
    "a Maverick": (
        "llama4", {"use_qk_norm": False, "attn_temperature_tuning": False, "no_rope_layers": [], "moe_layers": [0, 3],
                   "layer_types": ["chunked_attention", FULL] * 2},
    ),
    "norms of rotated layers alone": ("llama4", {"attn_temperature_tuning": False}),
    "one scale for all layers": ("olmo3", {"rope_parameters": None}),
    "no windows, and all rotated": ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 4}),
    "jitter": ("mixtral", {"router_jitter_noise": 0.1}),
}  # fmt: skip


LING = (
    ("self_attn.o_proj", "attention.dense"), ("self_attn.q_norm", "attention.query_layernorm"),
    ("self_attn.k_norm", "attention.key_layernorm"), ("embed_tokens", "word_embeddings"),
    ("gate.e_score_correction_bias", "gate.expert_bias"),
)  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_models_come_back_the_same(kind: str, tmp_path: Path) -> None:
    name, changes = ODD[kind]
    make(name, tmp_path / "hf", **changes)
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    verdict = verify(tmp_path / "checkpoint", tmp_path / "hf", None, 2, 48, 1e-4)
    assert verdict["ok"] and verdict["max_abs_diff"] < 1e-4 and not verdict["notes"]
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "hf", tmp_path / "out")
    one, two = (logits_by_transformers(tmp_path / folder) for folder in ("hf", "out"))
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(("name", "key"), [("qwen3_moe", "moe_intermediate_size"), ("mixtral", "intermediate_size")])
def test_experts_of_an_odd_width_are_verified(name: str, key: str, tmp_path: Path) -> None:
    """transformers' default for experts, a grouped product, refuses such widths."""
    make(name, tmp_path / "hf", **{key: 27})
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    assert verify(tmp_path / "checkpoint", tmp_path / "hf", None, 1, 24, 1e-4)["ok"]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_one_expert_with_normalised_weights_is_refused_with_a_fix_for_an_import(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "hf", num_experts_per_tok=1)
    with pytest.raises(ConfigError, match=r"top_k = 1") as caught:
        run_import(tmp_path / "hf", tmp_path / "checkpoint")
    assert "can't be converted" in caught.value.problems[0].fix and "set model" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss"])
def test_an_absent_key_has_transformers_default(model_type: str) -> None:
    """config.json may leave out what is at its default; the same model must come of it."""
    whole = CONFIG_MAPPING[model_type]().to_dict() | {"head_dim": None}
    family = family_named(model_type)
    stated, _ = family.to_model({name: value for name, value in whole.items() if value is not None})
    # What a config.json of every model states, and keys whose default transformers itself changed between versions.
    kept = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rope_parameters"}
    kept |= {"num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "layer_types"}
    kept |= {"max_position_embeddings", "topk_method", "n_group", "topk_group"}
    for name in sorted(family.known() & {key for key, value in whole.items() if value is not None} - kept):
        without, _ = family.to_model({key: value for key, value in whole.items() if value is not None and key != name})
        assert without == stated, name


def test_text_from_an_export_with_prediction_depths(tmp_path: Path) -> None:
    """transformers' model finds the tensors of the depths unexpected; they are not what is wrong with a folder."""
    make("deepseek_v3", tmp_path / "hf")
    with_prediction_depth(tmp_path / "hf", "deepseek_v3")
    with pytest.raises(ConfigError, match="must hold a tokenizer"):
        load_exported(tmp_path / "hf")
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, 90)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    native = generate(tmp_path / "checkpoint", ["w5 w9"], 4, 0.0, None, 0, None)["texts"]
    exported = generate_exported(tmp_path / "out", ["w5 w9"], 4, 0.0, None, 0)["texts"]
    assert native[0]["token_ids"] == exported[0]["token_ids"]
    held = tensors(tmp_path / "out") | {"model.layers.5.surprise": torch.ones(2)}
    save_file(held, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="surprise"):
        load_exported(tmp_path / "out")


def test_ling_in_the_names_of_its_own_code(tmp_path: Path) -> None:
    """transformers has no Ling 2.0. By its published code it computes what GLM-4.5 does with groups, under other names."""
    model = make("glm4_moe", tmp_path / "glm", n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=4,
                 attention_bias=False)  # fmt: skip
    glm, held = read_config(tmp_path / "glm"), {}
    for name, tensor in tensors(tmp_path / "glm").items():
        if name.endswith("q_proj.weight"):
            parts = [tensors(tmp_path / "glm")[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            held[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for theirs, ours in LING:
                name = name.replace(theirs, ours)
            held[name] = tensor
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "moe_intermediate_size", "rms_norm_eps", "n_group", "topk_group", "num_experts_per_tok",
            "routed_scaling_factor", "first_k_dense_replace", "max_position_embeddings")  # fmt: skip
    config = {"model_type": "bailing_moe", "architectures": ["BailingMoeV2ForCausalLM"], "num_experts": 12,
              "num_shared_experts": 1, "rope_theta": 3e4, "partial_rotary_factor": 0.5, "use_qk_norm": True,
              "norm_topk_prob": True, **{key: glm[key] for key in same}}  # fmt: skip
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    save_file(held, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "hf", tmp_path / "out")
    assert read_config(tmp_path / "out")["architectures"] == ["BailingMoeV2ForCausalLM"]
    # Of another type, the same checkpoint is a GLM.
    verdict = verify(tmp_path / "checkpoint", tmp_path / "glm", None, 2, 48, 1e-4)
    assert verdict["max_abs_diff"] < 1e-4 and model.config.n_group == 4
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"architectures": ["BailingMoeForCausalLM"]}))
    with pytest.raises(ConfigError, match="the first Ling"):
        run_import(tmp_path / "hf", tmp_path / "no")


def test_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    """Kimi-K2.5 in the names of its published files; the logits of transformers' own class for text are the import's."""
    config_classes: Any = CONFIG_MAPPING
    text = config_classes["deepseek_v3"](**MODELS["kimi"][1], pad_token_id=0).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4}
    config = config_classes["kimi_k25"](text_config=text, vision_config=vision, pad_token_id=0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval().float()
    randomize(model, 0)
    whole = make("kimi", tmp_path / "text")
    whole.model.load_state_dict(model.model.language_model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "text")
    held = {f"language_model.{name}": tensor for name, tensor in tensors(tmp_path / "text").items()}
    (tmp_path / "hf").mkdir()
    held_too = held | {"vision_tower.patch_embed.proj.weight": torch.ones(2, 2)}
    save_file(held_too, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    done = run_import(tmp_path / "hf", tmp_path / "checkpoint")
    assert any("1 tensors outside of the language model" in note for note in done["notes"])
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "text", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, exported(ids).logits, atol=1e-5)
    assert verify(tmp_path / "checkpoint", tmp_path / "out", None, 1, 24, 1e-4)["ok"]


def test_a_name_that_transformers_has_no_code_for(tmp_path: Path) -> None:
    """Kimi-K2's files name code of their own, which is never run."""
    make("kimi", tmp_path / "hf")
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModelForCausalLM": "modeling_deepseek.X"}
    config = read_config(tmp_path / "hf") | {"model_type": "kimi_k2", "auto_map": code}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    assert verify(tmp_path / "checkpoint", tmp_path / "hf", None, 1, 24, 1e-4)["ok"]
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert read_config(tmp_path / "out")["model_type"] == "deepseek_v3"
