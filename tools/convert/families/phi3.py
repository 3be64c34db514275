"""Phi-3 and Phi-4: a Llama whose files fuse queries, keys and values, and gate and up. Source: transformers models/phi3.

Checkpoints with LongRoPE (Phi-3-mini-128k, Phi-4-mini) are refused: megatron-core has no such scaling.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, FixedValue, tensor_rule
from tools.convert.hf_config.rope import Rope
from tools.convert.tensors import shared_rules as tensors
from tools.convert.tensors.row_mappings import query_key_value_together

_L = "model.layers.{L}."

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(None)),
        settings.PLAIN_MLP,
        settings.HeadDim(),
        Rope(fraction=1.0, kinds=("default",)),
        ConfigKey("sliding_window", "attention.window_size_tokens", None),
        FixedValue("attention.window_layers", "all"),
        FixedValue("attention.window_pattern", None),
        AllowedValues("resid_pdrop", (0.0,), "dropout on the residual stream is a setting of the run"),
        AllowedValues("embd_pdrop", (0.0,), "transformers does not apply it"),
        *settings.plain_attention("attention.window_size_tokens"),
        settings.NoExperts(),
    ),
    tensors=(
        *tensors.EMBEDDING,
        *tensors.NORMS,
        tensor_rule(
            "layer", "self_attention.linear_qkv.weight", _L + "self_attn.qkv_proj.weight", join=query_key_value_together
        ),
        tensor_rule("layer", "self_attention.linear_proj.weight", _L + "self_attn.o_proj.weight"),
        # Their rows are [gate; up], too.
        tensor_rule("dense", "mlp.linear_fc1.weight", _L + "mlp.gate_up_proj.weight"),
        tensor_rule("dense", "mlp.linear_fc2.weight", _L + "mlp.down_proj.weight"),
    ),
    ignored=("attention_bias",),
)  # fmt: skip
