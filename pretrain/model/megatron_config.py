"""The translation to Megatron-Core's settings. In: config, layout, stages and backend. Out: a TransformerConfig."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from configs.model_schema import Model, Position
from configs.schema import Config
from parallel.architecture import delta_layers, expert_ffn, ffn, has_delta_net, head_dim, moe_layers, num_query_groups
from parallel.compat.megatron_guards import router_loss_weight
from parallel.layout import Layout
from parallel.stages import Chunk, megatron_pipeline_layout
from pretrain.model.backend import Backend

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# activation -> (function, gated)
_ACTIVATIONS = {
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "gpt_oss_glu": (quick_gelu, True),
    "gelu": (F.gelu, False),
    "relu2": (squared_relu, False),
    "silu": (F.silu, False),
}


def make_transformer_config(config: Config, layout: Layout, chunks: tuple[Chunk, ...], backend: Backend) -> TransformerConfig:
    """The TransformerConfig of this rank's model. The loss is a sum over tokens; the engine divides it by their global number."""
    model = config.model
    values = {
        **_architecture(model),
        **_parallelism(layout, chunks),
        "overlap_moe_expert_parallel_comm": config.parallel.overlap_expert_comm,
        **_numerics(config, backend),
        **_recompute(config, backend),
        **(_experts(model, layout, backend) if model.moe.num_experts else {}),
    }
    if model.mla.kv_lora_rank is None:
        values |= _yarn(model.position)
        extra = {name: values.pop(name) for name in list(values) if name.startswith("yarn_")}
        result = TransformerConfig(**values)
        # GPTModel reads these by name; the dataclass does not declare them.
        for name, value in extra.items():
            setattr(result, name, value)
        # pretrain/model/specs.py reads it.
        result.qk_norm_all_heads = model.attention.qk_norm_span == "all_heads"  # type: ignore[attr-defined]
        result.qk_norm_after_rotation = model.attention.qk_norm_after_rotation  # type: ignore[attr-defined]
        result.post_norms = model.norm_position == "after"  # type: ignore[attr-defined]
        growth, step = model.attention.temperature_growth, model.attention.temperature_step_tokens
        # pretrain/model/norms.py reads it; pretrain/model/attention.py the next.
        result.temperature = (growth, step) if growth else None  # type: ignore[attr-defined]
        result.window_is_chunk = model.attention.window_kind == "chunked"  # type: ignore[attr-defined]
        return result
    latent = MLATransformerConfig(**values, **_latent_attention(model))
    # The norms of pretrain/model/specs.py read it. The dataclass has one epsilon for all norms.
    latent.latent_norm_eps = model.mla.norm_eps or model.norm_eps  # type: ignore[attr-defined]
    return latent


def _architecture(model: Model) -> dict[str, Any]:
    attention = model.attention
    activation, gated = _ACTIVATIONS[model.activation]
    values: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=attention.num_heads,
        num_query_groups=num_query_groups(model),
        kv_channels=head_dim(model),
        ffn_hidden_size=ffn(model),
        activation_func=activation,
        gated_linear_unit=gated,
        add_bias_linear=model.mlp_bias,
        add_qkv_bias=attention.qkv_bias,
        normalization="LayerNorm" if model.norm == "layernorm" else "RMSNorm",
        layernorm_zero_centered_gamma=model.norm == "zero_centered_rmsnorm",
        attention_output_gate=attention.output_gate,
        layernorm_epsilon=model.norm_eps,
        # MLA always normalises compressed queries and keys (DeepSeek-V2, arXiv 2405.04434).
        qk_layernorm=attention.qk_norm or model.mla.kv_lora_rank is not None,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=attention.dropout,
        qk_l2_norm=attention.qk_l2_norm,
        rotary_interleaved=model.position.interleaved,
        softmax_type="learnable" if attention.sinks else "vanilla",
        init_method_std=model.init_std,
        mtp_num_layers=model.mtp.num_layers or None,
        mtp_loss_scaling_factor=model.mtp.loss_coeff,
    )
    if attention.window_size_tokens is not None:
        values["window_size"] = (attention.window_size_tokens - 1, 0)
        values["window_attn_skip_freq"] = attention.window_pattern or (2 if attention.window_layers == "alternate" else None)
    if model.position.layer_pattern is not None:
        values["no_rope_freq"] = [1 - flag for flag in model.position.layer_pattern]
    if has_delta_net(model):
        net = model.delta_net
        # The module of pretrain/model/delta_net.py reads these. Megatron-Core's name of the variant would build its own module.
        values |= dict(
            linear_attention_freq=[int(is_delta) for is_delta in delta_layers(model)],
            linear_num_key_heads=net.num_key_heads,
            linear_num_value_heads=net.num_value_heads,
            linear_key_head_dim=net.key_head_dim,
            linear_value_head_dim=net.value_head_dim,
            linear_conv_kernel_dim=net.conv_size_tokens,
        )
    if model.activation == "gpt_oss_glu":
        values |= dict(glu_linear_offset=1.0, activation_func_clamp_value=7.0)
    return values


def _experts(model: Model, layout: Layout, backend: Backend) -> dict[str, Any]:
    moe, router = model.moe, model.moe.router
    weight = router_loss_weight(layout)
    return dict(
        num_moe_experts=moe.num_experts,
        moe_layer_freq=[int(is_moe) for is_moe in moe_layers(model)],
        moe_ffn_hidden_size=expert_ffn(model),
        moe_router_topk=moe.top_k,
        moe_apply_probs_on_input=moe.weights_on_input,
        # Softmax scores with a selection bias enter as the logits of sigmoids (pretrain/model/routers.py).
        moe_router_score_function="sigmoid" if router.expert_bias else router.score,
        # A softmax over the chosen logits equals a softmax over all logits whose chosen values are renormalised.
        moe_router_pre_softmax=router.score == "softmax" and not router.normalize_top_k,
        moe_router_topk_scaling_factor=None if router.scaling_factor == 1.0 else router.scaling_factor,
        moe_router_num_groups=router.num_groups,
        moe_router_group_topk=router.group_top_k,
        moe_router_enable_expert_bias=router.expert_bias,
        moe_router_bias_update_rate=router.expert_bias_update_rate,
        moe_router_load_balancing_type=router.balance,
        moe_aux_loss_coeff=0.0 if router.balance == "none" else router.aux_loss_coeff * weight,
        moe_z_loss_coeff=router.z_loss_coeff * weight or None,
        moe_input_jitter_eps=router.jitter_eps or None,
        # Scores in bf16 are often equal, and different layouts then choose different experts.
        moe_router_dtype="fp32",
        moe_token_dispatcher_type=moe.dispatcher,
        moe_flex_dispatcher_backend=backend.token_kernels or "deepep",
        moe_expert_capacity_factor=moe.capacity_factor,
        moe_pad_expert_input_to_capacity=moe.pad_to_capacity,
        moe_token_drop_policy=moe.drop_policy,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
        moe_shared_expert_gate=moe.shared_gate,
        moe_shared_expert_overlap=moe.shared_overlap,
        # Without Transformer Engine this key means a CUDA package. The layer spec chooses our own grouped experts.
        moe_grouped_gemm=backend.grouped_experts and backend.transformer_engine,
        moe_permute_fusion=backend.transformer_engine,
    )


def _latent_attention(model: Model) -> dict[str, Any]:
    mla, scaling = model.mla, model.position.scaling
    return dict(
        multi_latent_attention=True,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_head_dim=mla.qk_nope_head_dim,
        qk_pos_emb_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        rope_type="yarn" if scaling.kind == "yarn" else "rope",
        rotary_base=model.position.theta,
        # The factor also scales the softmax, with or without yarn.
        rotary_scaling_factor=scaling.factor if scaling.kind == "yarn" else 1.0,
        original_max_position_embeddings=scaling.original_max_position,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        mscale=scaling.mscale,
        mscale_all_dim=scaling.mscale_all_dim,
    )


def _yarn(position: Position) -> dict[str, Any]:
    scaling = position.scaling
    if scaling.kind != "yarn":
        return {}
    return dict(
        yarn_rotary_scaling_factor=scaling.factor,
        yarn_original_max_position_embeddings=scaling.original_max_position,
        yarn_beta_fast=scaling.beta_fast,
        yarn_beta_slow=scaling.beta_slow,
        yarn_mscale=scaling.mscale,
        yarn_mscale_all_dim=scaling.mscale_all_dim,
        yarn_correction_range_round_to_int=scaling.truncate,
    )


def _parallelism(layout: Layout, chunks: tuple[Chunk, ...]) -> dict[str, Any]:
    virtual = layout.virtual_pipeline > 1
    return dict(
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if virtual else None,
        pipeline_model_parallel_layout=megatron_pipeline_layout(chunks) if layout.pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        # In an interleaved schedule, batched sends and receives deadlock on gloo, and prevent overlap on NCCL.
        batch_p2p_comm=not virtual,
        deallocate_pipeline_outputs=True,
    )


def _numerics(config: Config, backend: Backend) -> dict[str, Any]:
    dtype = DTYPES[config.precision.params]
    fused = backend.transformer_engine
    values: dict[str, Any] = dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # pretrain/model/init.py fills weights by name, so that every layout starts from the same values. Megatron-Core marks how
        # a weight is split only while it initialises it, so its initialisation runs and does nothing.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        calculate_per_token_loss=True,
        bias_activation_fusion=fused and not config.model.activation.startswith("relu"),
        bias_dropout_fusion=fused,
        masked_softmax_fusion=fused,
        persist_layer_norm=fused,
        apply_rope_fusion=fused and config.model.mla.kv_lora_rank is None,
        gradient_accumulation_fusion=backend.fused_wgrad,
        cp_comm_type=config.parallel.context_comm if fused and config.parallel.context > 1 else None,
    )
    if backend.fp8:
        values |= dict(fp8=backend.fp8, fp8_recipe=config.precision.fp8_recipe)
    return values


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _recompute(config: Config, backend: Backend) -> dict[str, Any]:
    recompute = config.recompute
    if recompute.mode == "none":
        return {}
    if recompute.mode == "selective":
        # Only Transformer Engine can recompute the activation of the experts alone. Without it the activation is kept.
        modules = [
            name for name in recompute.modules if name != "moe_act" or (backend.grouped_experts and backend.transformer_engine)
        ]
        return dict(recompute_granularity="selective", recompute_modules=modules) if modules else {}
    return dict(recompute_granularity="full", recompute_method=recompute.method, recompute_num_layers=recompute.num_layers)
