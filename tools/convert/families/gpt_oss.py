"""gpt-oss (OpenAI): sinks, alternating windows, clamped SwiGLU with biases, experts transposed or packed in MXFP4.

Source: transformers models/gpt_oss. Hidden and inner width are equal (2880): no shape tells a transposed tensor; the tests
use unequal ones.

Torch-free.
"""

from __future__ import annotations

from tools.convert.hf_config import settings
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.family import AllowedValues, ConfigKey, Family, RepeatedKey, tensor_rule
from tools.convert.hf_config.rope import Rope
from tools.convert.hf_config.windows import Windows, alternating
from tools.convert.tensors import shared_rules as tensors
from tools.convert.tensors.row_mappings import interleaved, interleaved_columns, stacked, stacked_columns

_M = "model.layers.{L}.mlp."


GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    settings=(
        *settings.decoder(1e-5, settings.KeyValueHeads(8), ffn="moe.ffn_hidden_size"),
        settings.HeadDim(absent=64),
        Rope(theta=150000.0, stated=True),
        Windows(alternating, size=128, switch=False),
        AllowedValues("hidden_act", ("silu",), "its activation is fixed"),
        AllowedValues("attention_bias", (True,), "the family has biases in all linear layers"),
        AllowedValues("swiglu_limit", (7.0,), "megatron-core's clamp is set to the family's"),
        AllowedValues("swiglu_alpha", (1.702,), "megatron-core's quick_gelu has this factor"),
        *settings.plain_attention("attention.window_size_tokens", **{
            "activation": "gpt_oss_glu", "mlp_bias": True, "attention.sinks": True, "attention.qkv_bias": True,
            "attention.output_bias": True,
        }),
        ConfigKey("num_local_experts", "moe.num_experts", 128, aliases=("num_experts",)),
        ConfigKey("num_experts_per_tok", "moe.top_k", 4),
        RepeatedKey("experts_per_token", "moe.top_k"),
        settings.AllSparse(),
        AuxLossCoefficient(absent=0.001),
        *settings.softmax_router(
            **{"moe.router.bias": True, "moe.router.normalize_top_k": True, "moe.shared_ffn_hidden_size": None}
        ),
    ),
    tensors=(
        *tensors.EMBEDDING,
        *tensors.ATTENTION,
        tensor_rule("moe", "mlp.router.weight", _M + "router.weight"),
        tensor_rule("moe", "mlp.router.bias", _M + "router.bias"),
        tensor_rule(
            "expert", "mlp.experts.linear_fc1.weight", _M + "experts.gate_up_proj", join=interleaved_columns,
            also=(((_M + "experts.gate_up_proj_blocks",), interleaved),),
        ),
        tensor_rule("expert", "mlp.experts.linear_fc1.bias", _M + "experts.gate_up_proj_bias", join=interleaved),
        tensor_rule(
            "expert", "mlp.experts.linear_fc2.weight", _M + "experts.down_proj", join=stacked_columns,
            also=(((_M + "experts.down_proj_blocks",), stacked),),
        ),
        tensor_rule("expert", "mlp.experts.linear_fc2.bias", _M + "experts.down_proj_bias", join=stacked),
    ),
    ignored=("initial_context_length",),
)  # fmt: skip
