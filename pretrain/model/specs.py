"""Layer specs: the modules of a transformer layer. In: TransformerConfig and backend. Out: Megatron-Core's ModuleSpecs."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.post_training.modelopt.layers import Linear as ReplicatedLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from parallel.architecture import LayerKind
from parallel.compat.private_names import require_names
from parallel.stages import Chunk
from pretrain.model.attention import SDPAttention
from pretrain.model.backend import Backend
from pretrain.model.delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from pretrain.model.experts import GroupedExperts
from pretrain.model.norms import AllHeadsAttention, LateNormAttention, Llama4Attention, PostNormLayer

require_names(__name__)


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


class Norm:
    """Makes torch's RMSNorm or LayerNorm, whose parameters are marked for sequence parallelism.

    The mark tells Megatron-Core that each tensor rank has a part of the gradient. Its own WrappedTorchNorm refuses sequence
    parallelism.
    """

    # This is a class, because Megatron-Core's build_module returns a function without calling it.
    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = (ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else kind)(
            hidden_size, eps=eps, dtype=config.params_dtype
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


_LATENT_MODULES = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


class LatentNorm:
    """The norm of a compressed query or key, with an epsilon of its own. DeepSeek's is 1e-6, whatever the model's."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        return Norm(config, hidden_size, getattr(config, "latent_norm_eps", eps), **kwargs)


class LatentAttention(MLASelfAttention):
    """Latent attention with the modules that its spec names.

    Fault (megatron-core 0.19): it puts Transformer Engine's fused norms and products in the place of a spec's own where queries
    come from no latent vector. Symptoms: DeepSeek-V2-Lite can't be built without Transformer Engine, and with it its queries
    pass through a norm that the model does not have.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {name: getattr(submodules, name) for name in _LATENT_MODULES}


class CpuSpecProvider(LocalSpecProvider):
    """Megatron-Core's local modules with our norm and core attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> Any:
        return Norm

    def core_attention(self) -> type:
        return SDPAttention


def layer_spec(config: TransformerConfig, kind: LayerKind, backend: Backend) -> ModuleSpec:
    """The spec of one layer."""
    experts = config.num_moe_experts if kind.moe else None
    if backend.transformer_engine:
        spec: Any = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
        if config.multi_latent_attention:
            spec.submodules.self_attention.module = LatentAttention
        else:
            spec.submodules.self_attention.module = _self_attention(config)
        if kind.delta:
            fused = gpt_layer_specs.TESpecProvider()
            # Its norm stands alone: Transformer Engine would fuse it with the projection of attention.
            spec.submodules.input_layernorm = fused.layer_norm(rms_norm=True)
            spec.submodules.self_attention = _delta_net_spec(fused, backend)
        if _has_post_norms(config):
            _move_norms(spec, kind)
        return spec
    provider = CpuSpecProvider()
    bias_dropout_add: Any = get_bias_dropout_add
    mlp = gpt_layer_specs.get_mlp_module_spec_for_backend(provider, num_experts=experts, moe_grouped_gemm=False)
    if experts and backend.grouped_experts:
        _submodules_of(mlp).experts = GroupedExperts
    post: Any = _has_post_norms(config)
    return ModuleSpec(
        module=PostNormLayer if post else TransformerLayer,
        params={"norm": Norm} if post else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if post else Norm,
            self_attention=_delta_net_spec(provider, backend) if kind.delta else _attention_spec(config, provider),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if post else Norm,
            mlp=mlp,
            mlp_bda=bias_dropout_add,
        ),
    )


def _has_post_norms(config: TransformerConfig) -> bool:
    """Whether pretrain/model/megatron_config.py asks for norms after attention and MLP; the dataclass has no key for them."""
    return getattr(config, "post_norms", False)


def _move_norms(spec: Any, kind: LayerKind) -> None:
    """Move the norms of Transformer Engine's layer behind attention and MLP. Those before them are fused with projections."""
    fused = gpt_layer_specs.TESpecProvider()
    spec.module, spec.params = PostNormLayer, {"norm": fused.layer_norm(rms_norm=True)}
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
    spec.submodules.self_attention.submodules.linear_qkv = fused.column_parallel_linear()
    if not kind.moe:
        _submodules_of(spec.submodules.mlp).linear_fc1 = fused.column_parallel_linear()


def _self_attention(config: TransformerConfig) -> type[SelfAttention]:
    """The attention with the norms that pretrain/model/megatron_config.py asks for; the dataclass has no key for them."""
    if getattr(config, "qk_norm_all_heads", False):
        return AllHeadsAttention
    if config.qk_l2_norm or getattr(config, "temperature", None):
        return Llama4Attention
    return LateNormAttention if getattr(config, "qk_norm_after_rotation", False) else SelfAttention


def _submodules_of(spec: Any) -> Any:
    """The submodules of a layer's MLP: of a ModuleSpec, or, from megatron-core 0.18 on, of a functools.partial."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def _delta_net_spec(provider: Any, backend: Backend) -> ModuleSpec:
    submodules = GatedDeltaNetSubmodules(provider.column_parallel_linear(), provider.row_parallel_linear())
    return ModuleSpec(module=GatedDeltaNet, params={"fused": backend.delta_kernel}, submodules=submodules)


def _attention_spec(config: TransformerConfig, provider: CpuSpecProvider) -> ModuleSpec:
    column, row = provider.column_parallel_linear(), provider.row_parallel_linear()
    qk_norm = Norm if config.qk_layernorm else IdentityOp
    params = {"attn_mask_type": AttnMaskType.causal}
    if not config.multi_latent_attention:
        submodules = SelfAttentionSubmodules(
            linear_qkv=column, core_attention=SDPAttention, linear_proj=row, q_layernorm=qk_norm, k_layernorm=qk_norm
        )
        return ModuleSpec(module=_self_attention(config), params=params, submodules=submodules)
    # With column-parallel down projections and tensor > 1, megatron-core computes a wrong gradient without an error: its
    # norm was 1.09392 in place of 1.09504. Replicated down projections, as in Transformer Engine's spec, are right.
    has_latent_queries = getattr(config, "q_lora_rank", None) is not None
    latent = MLASelfAttentionSubmodules(
        linear_q_proj=column, linear_q_down_proj=ReplicatedLinear, linear_q_up_proj=column,
        linear_kv_down_proj=ReplicatedLinear, linear_kv_up_proj=column,
        core_attention=SDPAttention, linear_proj=row, kv_layernorm=LatentNorm,
        # Queries that come from no latent vector have no norm. megatron-core 0.19 refuses to build one.
        q_layernorm=LatentNorm if has_latent_queries else IdentityOp,
    )  # fmt: skip
    return ModuleSpec(module=LatentAttention, params=params, submodules=latent)


def _layer_kinds(config: TransformerConfig) -> list[LayerKind]:
    """The kind of each layer of the whole model, from the lists that megatron_config makes."""
    moe = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    delta = config.linear_attention_freq or [0] * config.num_layers
    assert isinstance(moe, list) and isinstance(delta, list), "megatron_config gives the patterns layer by layer"
    return [LayerKind(bool(is_moe), bool(is_delta)) for is_moe, is_delta in zip(moe, delta, strict=True)]


def block_spec(config: TransformerConfig, chunk: Chunk, backend: Backend) -> TransformerBlockSubmodules:
    """The layers of one chunk and the norm after the last."""
    kinds = _layer_kinds(config)
    specs = {kind: layer_spec(config, kind, backend) for kind in {kinds[i] for i in chunk.layers}}
    provider = gpt_layer_specs.TESpecProvider() if backend.transformer_engine else CpuSpecProvider()
    final_norm: Any = provider.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=False)
    return TransformerBlockSubmodules(layer_specs=[specs[kinds[i]] for i in chunk.layers], layer_norm=final_norm)


def mtp_spec(config: TransformerConfig, backend: Backend, vp_stage: int | None) -> Any:
    """The spec of multi-token prediction: attention, and the experts or MLP of the model's last layer."""
    layer = layer_spec(config, LayerKind(_layer_kinds(config)[-1].moe), backend)
    provider = gpt_layer_specs.TESpecProvider() if backend.transformer_engine else CpuSpecProvider()
    return gpt_layer_specs.get_gpt_mtp_block_spec_for_backend(config, layer, provider, vp_stage=vp_stage)
