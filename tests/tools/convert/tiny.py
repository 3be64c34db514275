"""Tiny random models of every family, made by transformers: every dimension another number, no default eps or theta."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"

YARN = {
    "rope_type": "yarn", "rope_theta": 7000.0, "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 24.0,
    "beta_slow": 2.0,
}  # fmt: skip
GQA = {
    "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 90, "max_position_embeddings": 128,
}  # fmt: skip
LATENT = {
    "hidden_size": 40, "intermediate_size": 72, "moe_intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
    "v_head_dim": 14, "vocab_size": 90, "max_position_embeddings": 128,
}  # fmt: skip


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# name -> (model_type, config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        GQA | rope(3e5) | {"intermediate_size": 56, "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 3e-5,
                           "sliding_window": 20},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        GQA | rope(2e5) | {"intermediate_size": 72, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 44,
                           "num_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 2e-6, "norm_topk_prob": False,
                           "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        GQA | rope(9e4) | {"intermediate_size": 72, "moe_intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 3,
                           "norm_topk_prob": True, "rms_norm_eps": 4e-6, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "qwen3": ("qwen3", GQA | rope(8e4) | {"intermediate_size": 72, "rms_norm_eps": 4e-6, "tie_word_embeddings": True}),
    "qwen3_yarn": ("qwen3", GQA | {"rope_parameters": YARN, "intermediate_size": 72, "rms_norm_eps": 4e-6}),
    "llama": ("llama", GQA | {"rope_parameters": LLAMA3, "hidden_size": 48, "intermediate_size": 72, "rms_norm_eps": 2e-5}),
    "llama_linear": (
        "llama", GQA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 6000.0, "factor": 3.0}, "hidden_size": 48,
                        "intermediate_size": 72, "rms_norm_eps": 2e-5},
    ),
    "mistral": ("mistral", GQA | rope(4e4) | {"intermediate_size": 72, "sliding_window": 12, "rms_norm_eps": 2e-5}),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, "n_routed_experts": 6, "n_shared_experts": 2,
                  "num_experts_per_tok": 3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
                  "rms_norm_eps": 3e-6, "routed_scaling_factor": 1.3},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "n_routed_experts": 8, "n_shared_experts": 1,
                  "num_experts_per_tok": 4, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rms_norm_eps": 3e-5,
                  "routed_scaling_factor": 1.7, "num_nextn_predict_layers": 0},
    ),
    "kimi": (
        "deepseek_v3",
        LATENT | {"rope_parameters": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
                  "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "q_lora_rank": 24, "n_group": 1,
                  "topk_group": 1, "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0},
    ),
    "glm4_moe": (
        "glm4_moe",
        GQA | rope(3e4, partial_rotary_factor=0.5) | {
            "intermediate_size": 72, "moe_intermediate_size": 28, "n_routed_experts": 4, "n_shared_experts": 1,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True, "n_group": 1,
            "topk_group": 1, "routed_scaling_factor": 2.5, "rms_norm_eps": 3e-5, "num_nextn_predict_layers": 0},
    ),
    "qwen2": ("qwen2", GQA | rope(7e4) | {"hidden_size": 48, "intermediate_size": 72, "rms_norm_eps": 4e-6}),
    "phi3": ("phi3", GQA | rope(3e4) | {"hidden_size": 48, "intermediate_size": 72, "rms_norm_eps": 2e-5, "sliding_window": 12}),
    "dots1": (
        "dots1",
        GQA | rope(3e4) | {"intermediate_size": 72, "moe_intermediate_size": 28, "n_routed_experts": 6, "n_shared_experts": 2,
                           "num_experts_per_tok": 3, "first_k_dense_replace": 1, "norm_topk_prob": True, "rms_norm_eps": 3e-5,
                           "routed_scaling_factor": 2.5, "sliding_window": 12, "max_window_layers": 1},
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        LATENT | rope(3e4) | {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "q_lora_rank": 24,
                              "rms_norm_eps": 3e-5, "routed_scaling_factor": 1.7, "num_hidden_layers": 3,
                              "mlp_layer_types": ["sparse", "dense", "sparse"], "first_k_dense_replace": None},
    ),
    "hy_v3": (
        "hy_v3",
        GQA | rope(3e4) | {"intermediate_size": 72, "moe_intermediate_size": 28, "num_experts": 6, "num_shared_experts": 2,
                           "num_experts_per_tok": 3, "router_scaling_factor": 1.7, "rms_norm_eps": 3e-5},
    ),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense", GQA | rope(3e4) | {"hidden_size": 48, "intermediate_size": 72, "rms_norm_eps": 2e-5},
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        GQA | {"hidden_size": 48, "intermediate_size": 28, "num_experts": 6, "moe_topk": 3, "rms_norm_eps": 2e-5,
               "rope_parameters": {"rope_type": "dynamic", "rope_theta": 900.0, "alpha": 40.0, "factor": 1.0}},
    ),
    "minimax_m2": (
        "minimax_m2",
        GQA | rope(3e4, partial_rotary_factor=0.5) | {"intermediate_size": 28, "num_local_experts": 6, "num_experts_per_tok": 3,
                                                      "rms_norm_eps": 3e-5},
    ),
    "olmoe": (
        "olmoe",
        GQA | rope(3e4) | {"hidden_size": 48, "intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 3,
                           "rms_norm_eps": 3e-5},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        GQA | rope(3e4) | {"intermediate_size": 72, "moe_intermediate_size": 28, "moe_num_experts": 6, "moe_k": 3,
                           "moe_num_shared_experts": 2, "rms_norm_eps": 3e-5, "tie_word_embeddings": False},
    ),
    "smollm3": (
        "smollm3",
        GQA | rope(3e4) | {"hidden_size": 48, "intermediate_size": 72, "rms_norm_eps": 2e-5, "num_hidden_layers": 4,
                           "no_rope_layers": [1, 0, 0, 1]},
    ),
    "exaone_moe": (
        "exaone_moe",
        GQA | rope(3e4) | {"intermediate_size": 72, "moe_intermediate_size": 28, "num_experts": 6, "num_shared_experts": 1,
                           "num_experts_per_tok": 3, "rms_norm_eps": 3e-5, "num_hidden_layers": 4, "sliding_window": 12,
                           "sliding_window_pattern": 2, "layer_types": None},
    ),
    "llama4": (
        "llama4_text",
        GQA | {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0, "original_max_position_embeddings": 16},
               "intermediate_size": 28, "intermediate_size_mlp": 72, "num_local_experts": 6, "num_experts_per_tok": 1,
               "rms_norm_eps": 3e-5, "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 0, 0],
               "attention_chunk_size": 11, "floor_scale": 5, "attn_scale": 0.4},
    ),
    "olmo2": ("olmo2", GQA | rope(3e4) | {"hidden_size": 48, "intermediate_size": 72, "rms_norm_eps": 2e-5}),
    "flex_olmo": (
        "flex_olmo",
        GQA | rope(3e4) | {"hidden_size": 48, "intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 3,
                           "rms_norm_eps": 3e-5},
    ),
    "olmo3": (
        "olmo3",
        GQA | {"hidden_size": 48, "intermediate_size": 72, "rms_norm_eps": 2e-5, "num_hidden_layers": 4, "sliding_window": 12,
               "layer_types": ["sliding_attention", "full_attention"] * 2,
               "rope_parameters": {"full_attention": YARN | {"rope_theta": 500000.0},
                                   "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0}}},
    ),
    "exaone4": (
        "exaone4",
        GQA | rope(3e4) | {"hidden_size": 48, "intermediate_size": 72, "rms_norm_eps": 2e-5, "num_hidden_layers": 4,
                           "sliding_window": 12, "sliding_window_pattern": 2},
    ),
    "gpt_oss": (
        "gpt_oss",
        GQA | {"rope_parameters": YARN | {"truncate": False}, "intermediate_size": 28, "num_local_experts": 4,
               "num_experts_per_tok": 2, "sliding_window": 11, "rms_norm_eps": 3e-5,
               "layer_types": ["full_attention", "sliding_attention"]},
    ),
}  # fmt: skip

HYBRID = GQA | rope(7e4, partial_rotary_factor=0.5) | {
    "num_hidden_layers": 5, "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention",
                                            "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 10, "linear_value_head_dim": 7,
    # Where a value head's output is almost 0, its norm makes 1e-4 of half a unit in the last place of the weights, within
    # transformers too, unless epsilon is above it.
    "linear_conv_kernel_dim": 3, "rms_norm_eps": 2e-2,
}  # fmt: skip
_GATED_MOE = {"moe_intermediate_size": 28, "shared_expert_intermediate_size": 44, "num_experts": 6, "num_experts_per_tok": 3}
MODELS |= {
    "qwen3_next": ("qwen3_next", HYBRID | _GATED_MOE | {"intermediate_size": 72, "mlp_only_layers": [1]}),
    "qwen3_5": ("qwen3_5_text", HYBRID | {"intermediate_size": 72, "tie_word_embeddings": True}),
    "qwen3_5_moe": ("qwen3_5_moe_text", HYBRID | _GATED_MOE),
}


# Their layers are those of other families, or differ only in names.
RARE = (
    "qwen2",
    "phi3",
    "dots1",
    "glm4_moe_lite",
    "hy_v3",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "olmoe",
    "ernie4_5_moe",
    "smollm3",
    "exaone_moe",
    "exaone4",
    "olmo2",
    "olmo3",
    "flex_olmo",
    "qwen3_5",
)


def make(name: str, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Save the model `name` into `folder` (as save_pretrained does) and return it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # noqa: PLC0415  (3 s)

    model_type, values = MODELS[name]
    config = CONFIG_MAPPING[model_type](**{**values, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    randomize(model, seed)
    model.save_pretrained(folder)
    return model


def logits_by_transformers(folder: Path) -> torch.Tensor:
    """transformers' logits [1, 40, vocabulary] of the model in `folder`, on fixed tokens."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  (3 s)

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(torch.arange(40)[None]).logits


def randomize(model: Any, seed: int) -> None:
    """Weights large enough for differences to show; norms and biases that are neither 1 nor 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # A norm's weight starts at what multiplies by 1: at 1, or at 0 where it is zero-centred.
            parameter.copy_(noise * 0.3 if parameter.dim() > 1 else noise * 0.2 + (parameter if "norm" in name else 0.0))
        for name, buffer in model.named_buffers():
            if "e_score" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
