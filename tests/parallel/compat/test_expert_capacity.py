"""Expert capacity: which tokens are dropped, and that loads are measured before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter

from configs.schema import Config
from parallel.compat.expert_capacity import drop_tokens, routed_before_dropping
from pretrain.metrics.moe_metrics import MoeMetrics
from tests.pretrain.engine.test_deepspeed_state import make
from tests.pretrain.world import batches_of, small_config
from tests.ranks import run_ranks

CAPACITY = {"model__moe__capacity_factor": 0.5, "model__moe__pad_to_capacity": True}
BIAS = {"model__moe__router__score": "sigmoid", "model__moe__router__expert_bias": True}


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
@settings(deadline=None)
def test_position_keeps_the_first_tokens(num_tokens: int, num_experts: int, seed: int, pad: bool) -> None:
    """GShard, algorithm 1: an expert takes tokens by position until it is full."""
    generator = torch.Generator().manual_seed(seed)
    routed = torch.rand(num_tokens, num_experts, generator=generator) < 0.6
    probs = torch.rand(num_tokens, num_experts, generator=generator) * routed
    factor = 0.7
    capacity = -(-num_tokens * 7 // (num_experts * 10))
    kept_probs, kept = drop_tokens(probs, routed, 1, factor, "position", pad)
    if capacity > num_tokens:
        return
    want = routed & (routed.int().cumsum(dim=0) <= capacity)
    assert torch.equal(kept & routed, want)
    assert torch.equal(kept_probs, probs * want)
    assert torch.equal(routed_before_dropping(kept), routed)
    if pad:
        assert kept.sum(dim=0).tolist() == [capacity] * num_experts
    else:
        assert not (kept & ~routed).any()


def test_megatron_core_keeps_other_tokens() -> None:
    """The fault that the guard is for: when this fails, Megatron-Core's own will do."""
    routed = torch.ones(2000, 1, dtype=torch.bool)
    _, kept = apply_router_token_dropping(torch.rand(2000, 1), routed, 1, 0.5, "position")
    assert not kept[:1000].all()


@pytest.mark.parametrize("pad", [False, True])
def test_dropping_by_probability_is_megatron_cores(pad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(30, 4, generator=generator)
    routed = probs > 0.3
    got, want = (drop(probs * routed, routed, 2, 0.5, "probs", pad) for drop in (drop_tokens, apply_router_token_dropping))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def biases(config: Config) -> list[list[float]]:
    """The expert bias of each layer after a step."""
    engine, groups = make(config)
    engine.step(batches_of(config, 0, groups.dp.rank(), groups.dp.size()), 0.0)
    model: Any = engine
    chunks = model.chunks if config.zero.engine == "deepspeed" else model.models
    modules = chunks[0].modules()
    return [module.get_buffer("expert_bias").tolist() for module in modules if isinstance(module, TopKRouter)]


@pytest.mark.usefixtures("deepspeed_imported")
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_the_bias_moves_by_the_load_before_dropping(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step routes alike with and without capacity up to the first layer: its bias must move alike."""
    keys = {**BIAS, "zero__engine": engine, "zero__stage": 1}
    free = run_ranks(1, biases, small_config(**keys))[0]
    padded = run_ranks(1, biases, small_config(**keys, **CAPACITY))[0]
    assert padded[0] == free[0] and len(set(free[0])) > 1
    assert all(len(set(layer)) > 1 for layer in padded)
    monkeypatch.setattr("pretrain.build.measure_before_dropping", lambda model: None)
    unguarded = run_ranks(1, biases, small_config(**keys, **CAPACITY))[0]
    assert all(len(set(layer)) == 1 for layer in unguarded), "equal loads: every bias stays where it is"


def loads(config: Config) -> dict[str, float]:
    engine, groups = make(config)
    model: Any = engine
    chunks = model.chunks if config.zero.engine == "deepspeed" else [chunk.module for chunk in model.models]
    moe = MoeMetrics(chunks, config.model, groups)
    batches = batches_of(config, 0, groups.dp.rank(), groups.dp.size())
    engine.step(batches, 0.0)
    return moe.take(len(batches), 4)


@pytest.mark.parametrize("pad", [False, True])
def test_loads_are_measured_before_dropping(pad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = {"model__moe__capacity_factor": 0.5, "model__moe__pad_to_capacity": pad}
    free = run_ranks(1, loads, small_config())[0]
    dropped = run_ranks(1, loads, small_config(**capacity))[0]
    first_layer = "expert_load_max_over_mean/layer_0"
    assert dropped[first_layer] == free[first_layer]
    # 32 choices of 16 tokens for 8 experts that take 2 each: at least half are dropped.
    assert 0.5 <= dropped["expert_drop_fraction"] < 0.8 and "expert_drop_fraction" not in free
    none = run_ranks(1, loads, small_config(**{**capacity, "model__moe__capacity_factor": 4.0}))[0]
    assert none["expert_drop_fraction"] == 0.0
    monkeypatch.setattr("pretrain.metrics.moe_metrics.routed_before_dropping", lambda taken: taken)
    unguarded = run_ranks(1, loads, small_config(**capacity))[0]
    assert unguarded[first_layer] < free[first_layer]


@pytest.mark.usefixtures("deepspeed_imported")
def test_loads_are_measured_before_dropping_where_deepspeed_copies_what_a_router_returns() -> None:
    want, got = (
        run_ranks(1, loads, small_config(**CAPACITY, zero__engine=engine, zero__stage=stage))[0]
        for engine, stage in (("megatron", 0), ("deepspeed", 3))
    )
    assert got == pytest.approx(want) and got["expert_load_max_over_mean"] > 1 and got["expert_drop_fraction"] > 0
