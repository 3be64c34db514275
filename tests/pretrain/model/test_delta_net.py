"""The gated delta net against transformers' plain torch: recurrence, gradients and module. And the choice of its kernel."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

from configs.schema import Config
from parallel.architecture import LayerKind
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.model import specs
from pretrain.model.backend import Backend, choose_backend, detect_machine
from pretrain.model.delta_net import CHUNK_TOKENS, GatedDeltaNet, chunked_delta_rule, fused_delta_rule
from pretrain.model.megatron_config import make_transformer_config
from tests.pretrain.world import small_config
from tests.ranks import run_ranks
from tools.convert.tensors.row_mappings import delta_columns, delta_grouped

NET = {"num_key_heads": 2, "num_value_heads": 6, "key_head_dim": 10, "value_head_dim": 7, "conv_size_tokens": 3}


def hybrid_config() -> Config:
    return small_config(model__delta_net__pattern=[1, 0], **{f"model__delta_net__{key}": value for key, value in NET.items()})


@pytest.mark.parametrize("length", [1, 5, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 3])
def test_chunks_equal_the_recurrence_token_by_token(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(2, length, 3, width, generator=generator) for width in (8, 8, 6))
    log_decay, beta = (torch.rand(2, length, 3, generator=generator) for _ in range(2))
    # Decays from almost 1 to e^-20, where a product of many underflows.
    log_decay = -20 * log_decay**4
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, log_decay, beta)]
    got = chunked_delta_rule(*inputs)
    want, _ = modeling_qwen3_next.torch_recurrent_gated_delta_rule(
        query, key, value, g=log_decay, beta=beta, use_qk_l2norm_in_kernel=True
    )
    assert torch.allclose(got, want, rtol=0, atol=1e-5)
    weight = torch.randn(got.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (got, want))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))


def largest_module_difference(config: Config) -> float:
    """The largest difference of the outputs of our module and transformers', with the same weights."""
    start({})
    layout = make_layout(config)
    groups = make_groups(layout, config.run.seed)
    backend = choose_backend(config, detect_machine(cuda=False))
    chunks = make_chunks(config.model, 1, 1, 300)
    transformer = make_transformer_config(config, layout, chunks, backend)
    spec: Any = specs.layer_spec(transformer, LayerKind(False, True), backend)
    ours: Any = build_module(spec.submodules.self_attention, config=transformer, layer_number=1, pg_collection=groups)
    net = config.model.delta_net
    theirs: Any = modeling_qwen3_next.Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=config.model.hidden_size, rms_norm_eps=config.model.norm_eps, num_hidden_layers=1,
            layer_types=["linear_attention"], linear_num_key_heads=net.num_key_heads, linear_key_head_dim=net.key_head_dim,
            linear_num_value_heads=net.num_value_heads, linear_value_head_dim=net.value_head_dim,
            linear_conv_kernel_dim=net.conv_size_tokens,
        ),
        0,
    )  # fmt: skip
    held = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in held.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        for name in ("A_log", "dt_bias"):
            getattr(ours, name).copy_(held[name])
        ours.out_norm.weight.copy_(held["norm.weight"])
        ours.linear_proj.weight.copy_(held["out_proj.weight"])
        rows = len(ours.linear_in.weight)
        for mapping in delta_grouped(config.model, "", (), rows, ["in_proj_qkvz.weight", "in_proj_ba.weight"]):
            part = held[mapping.hf_name][mapping.hf_row : mapping.hf_row + mapping.rows]
            ours.linear_in.weight[mapping.row : mapping.row + mapping.rows] = part
        for mapping in delta_columns(config.model, "", (), rows, ["conv1d.weight"]):
            part = held[mapping.hf_name][mapping.hf_row : mapping.hf_row + mapping.rows]
            ours.conv1d.weight[mapping.row : mapping.row + mapping.rows] = part
        tokens = torch.randn(CHUNK_TOKENS + 9, 2, config.model.hidden_size, generator=generator)
        got, bias = ours(tokens)
        assert bias is None
        return float((got - theirs(tokens.transpose(0, 1)).transpose(0, 1)).abs().max())


def test_the_module_equals_transformers() -> None:
    assert run_ranks(1, largest_module_difference, hybrid_config())[0] < 1e-5


def test_the_kernel_of_flash_linear_attention_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package needs a GPU and is not here. A function of its signature stands where its kernel would."""
    seen: dict[str, Any] = {}

    def kernel(q: Any, k: Any, v: Any, g: Any, beta: Any, use_qk_l2norm_in_kernel: bool) -> tuple[Any, None]:
        seen.update(q=q, k=k, v=v, g=g, beta=beta)
        return chunked_delta_rule(q, k, v, g, beta), None

    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", SimpleNamespace(chunk_gated_delta_rule=kernel))
    inputs = [torch.rand(1, 4, 2, 3), torch.rand(1, 4, 2, 3), torch.rand(1, 4, 2, 5), -torch.rand(1, 4, 2), torch.rand(1, 4, 2)]
    assert torch.equal(fused_delta_rule()(*inputs), chunked_delta_rule(*inputs))
    assert all(mine is given for mine, given in zip(seen.values(), inputs, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_layers_under_transformer_engine(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine is not here: Megatron-Core's local modules stand where its own would."""
    provider = specs.CpuSpecProvider()
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", lambda: provider, raising=False)
    monkeypatch.setattr(
        gpt_layer_specs,
        "get_gpt_layer_with_transformer_engine_spec",
        lambda **keys: gpt_layer_specs.get_gpt_layer_local_spec(None, False, True, False),
    )
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    spec: Any = specs.layer_spec(config, LayerKind(False, True), Backend(True, True, True, None, delta_kernel=fused))
    mixer = spec.submodules.self_attention
    assert mixer.module is GatedDeltaNet and mixer.params == {"fused": fused}
    assert mixer.submodules.linear_in is provider.column_parallel_linear()
    assert spec.submodules.input_layernorm is specs.Norm
