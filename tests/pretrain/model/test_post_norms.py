"""Norms after attention and MLP under Transformer Engine. tests/tools/convert holds the formula against transformers."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.architecture import LayerKind
from pretrain.model import specs
from pretrain.model.backend import Backend
from pretrain.model.norms import PostNormLayer

FUSED = object()


@pytest.mark.parametrize("moe", [False, True])
def test_no_norm_stays_fused_with_a_projection(moe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine is not here: Megatron-Core's local modules stand where its own would, with its fused ones marked."""
    provider = specs.CpuSpecProvider()

    def fused_layer(**keys: Any) -> Any:
        spec: Any = gpt_layer_specs.get_gpt_layer_local_spec(keys["num_experts"], False, True, False)
        spec.submodules.self_attention.submodules.linear_qkv = FUSED
        if not moe:
            specs._submodules_of(spec.submodules.mlp).linear_fc1 = FUSED
        return spec

    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", lambda: provider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", fused_layer)
    experts = 2 if moe else None
    config: Any = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, add_bias_linear=False, num_moe_experts=experts
    )
    config.post_norms = True
    spec: Any = specs.layer_spec(config, LayerKind(moe), Backend(True, False, True, None))
    assert spec.module is PostNormLayer and spec.params == {"norm": specs.Norm}
    assert spec.submodules.input_layernorm is IdentityOp is spec.submodules.pre_mlp_layernorm
    assert spec.submodules.self_attention.submodules.linear_qkv is provider.column_parallel_linear()
    if not moe:
        assert specs._submodules_of(spec.submodules.mlp).linear_fc1 is provider.column_parallel_linear()
