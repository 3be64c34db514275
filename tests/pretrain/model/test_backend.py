"""One pure function decides which implementation runs."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from parallel.architecture import LayerKind
from pretrain.model.backend import Backend, DetectedMachine, check_backend, choose_backend
from pretrain.model.specs import LatentAttention, layer_spec
from tests.pretrain.world import small_config

CPU = DetectedMachine(cuda=False, transformer_engine=False, fused_wgrad=False)
GPU = DetectedMachine(cuda=True, transformer_engine=True, fused_wgrad=True)
FLEX = {"model__moe__dispatcher": "flex"}
HYBRID = {"model__delta_net__pattern": [1, 0]}
BF16 = {"precision__params": "bf16"}


@pytest.mark.parametrize(
    ("machine", "changes", "want"),
    [
        (CPU, {}, Backend(False, True, False, None)),
        (CPU, {"model__moe__grouped_gemm": "off"}, Backend(False, False, False, None)),
        (CPU, {"model__moe__ffn_hidden_size": 22}, Backend(False, False, False, None)),
        (CPU, {"parallel__expert_tensor": 4, "model__moe__ffn_hidden_size": 24}, Backend(False, False, False, None)),
        (CPU, {"model__mlp_bias": True}, Backend(False, False, False, None)),
        (CPU, {"model__moe__num_experts": 0}, Backend(False, False, False, None)),
        (GPU, {}, Backend(True, True, True, None)),
        (GPU, {"model__moe__grouped_gemm": "off", "precision__fp8": "hybrid"}, Backend(True, False, True, "hybrid")),
        (DetectedMachine(True, True, False), {}, Backend(True, True, False, None)),
        (DetectedMachine(True, True, True, ("hybridep", "deepep")), {}, Backend(True, True, True, None)),
        (DetectedMachine(True, True, True, ("hybridep", "deepep")), FLEX, Backend(True, True, True, None, "hybridep")),
        (DetectedMachine(True, True, True, ("deepep",)), FLEX, Backend(True, True, True, None, "deepep")),
        (DetectedMachine(True, True, True, (), True), {}, Backend(True, True, True, None)),
        (DetectedMachine(True, True, True, (), True), HYBRID | BF16, Backend(True, True, True, None, delta_kernel=True)),
        (DetectedMachine(True, True, True, (), True), HYBRID, Backend(True, True, True, None)),
        (GPU, HYBRID | BF16, Backend(True, True, True, None)),
        (CPU, HYBRID, Backend(False, True, False, None)),
    ],
)
def test_the_backend_of_each_machine_and_config(machine: DetectedMachine, changes: dict[str, Any], want: Backend) -> None:
    config = small_config(**changes)
    assert check_backend(config, machine) == []
    assert choose_backend(config, machine) == want


@pytest.mark.parametrize(
    ("machine", "changes", "path"),
    [
        (DetectedMachine(True, False, False), {}, "cluster.device"),
        (CPU, {"precision__fp8": "e4m3"}, "precision.fp8"),
        (GPU, FLEX, "model.moe.dispatcher"),
        (CPU, {"model__moe__grouped_gemm": "on", "model__moe__ffn_hidden_size": 22}, "model.moe.grouped_gemm"),
    ],
)
def test_what_a_machine_lacks_is_named(machine: DetectedMachine, changes: dict[str, Any], path: str) -> None:
    (problem,) = check_backend(small_config(**changes), machine)
    assert problem.path == path and problem.fix


@pytest.mark.parametrize("is_latent", [True, False])
def test_latent_attention_keeps_its_modules_under_transformer_engine(is_latent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine is not here: Megatron-Core's local spec, of the same shape, stands where its spec would."""

    def local_spec(num_experts: Any, moe_grouped_gemm: bool, qk_layernorm: bool, multi_latent_attention: bool) -> Any:
        return gpt_layer_specs.get_gpt_layer_local_spec(None, False, qk_layernorm, multi_latent_attention)

    monkeypatch.setattr(gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", local_spec)
    kind = MLATransformerConfig if is_latent else TransformerConfig
    config = kind(num_layers=1, hidden_size=8, num_attention_heads=2, multi_latent_attention=is_latent)
    spec: Any = layer_spec(config, LayerKind(False), Backend(True, True, True, None))
    assert spec.submodules.self_attention.module is (LatentAttention if is_latent else SelfAttention)
