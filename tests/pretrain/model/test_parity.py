"""Layout changes nothing but speed: every axis against one process, on the real Megatron-Core over gloo.

Loss agrees to 1e-6 and the gradient norm to 1e-5 over three optimizer steps with random loss masks, every weight to
1e-4 (the norm of a difference over the norm; Adam's first steps magnify rounding), router metrics to 1e-5.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

from configs.schema import Config
from parallel.compat import megatron_guards as guards
from parallel.compat.index import is_needed
from pretrain.model import megatron_config
from tests.pretrain import world as world_module
from tests.pretrain.world import Trained, assemble, largest_difference, small_config, train_small
from tests.ranks import run_ranks

Keys = tuple[tuple[str, Any], ...]

TP, PP, VPP, CP, EP, ETP = (
    f"parallel__{axis}" for axis in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
)

LAYOUTS: list[Any] = [
    (2, {EP: 2}),
    (2, {TP: 2}),
    (2, {TP: 2, ETP: 2}),
    (2, {PP: 2, VPP: 2}),
    (2, {CP: 2}),
    (2, {"zero__stage": 0}),
    (4, {TP: 2, PP: 2, EP: 2}),
    (4, {TP: 2, EP: 2, ETP: 2, "zero__stage": 0}),
    pytest.param(8, {TP: 2, PP: 2, CP: 2, EP: 2}, marks=pytest.mark.prove),
]

MODELS: dict[str, dict[str, Any]] = {
    "deepseek": {
        "model__mla__kv_lora_rank": 16, "model__mla__q_lora_rank": 20, "model__mla__qk_nope_head_dim": 12,
        "model__mla__qk_rope_head_dim": 8, "model__mla__v_head_dim": 10, "model__attention__num_query_groups": None,
        "model__attention__qk_norm": False, "model__attention__head_dim": None,
        "model__moe__router__score": "sigmoid", "model__moe__router__expert_bias": True,
        "model__moe__router__num_groups": 4, "model__moe__router__group_top_k": 2,
        "model__moe__router__scaling_factor": 2.5, "model__moe__router__balance": "seq_aux_loss",
        "model__moe__shared_ffn_hidden_size": 40, "model__moe__first_dense_layers": 1, "model__mtp__num_layers": 1,
    },
    "gpt_oss": {
        "model__attention__sinks": True, "model__attention__window_size_tokens": 5,
        "model__attention__window_layers": "alternate", "model__mlp_bias": True, "model__attention__qkv_bias": True,
        "model__attention__output_bias": True, "model__moe__router__bias": True, "model__activation": "gpt_oss_glu",
        "model__attention__qk_norm": False,
    },
    "mixtral": {"model__attention__qk_norm": False, "model__moe__router__z_loss_coeff": 0.01},
    "qwen2_moe_tied": {
        "model__tie_embeddings": True, "model__moe__shared_ffn_hidden_size": 40, "model__moe__shared_gate": True,
        "model__moe__router__normalize_top_k": False, "model__attention__qkv_bias": True,
    },
    "gpt3": {
        "model__moe__num_experts": 0, "model__position__kind": "learned", "model__norm": "layernorm",
        "model__activation": "gelu", "model__mlp_bias": True, "model__attention__qkv_bias": True,
        "model__attention__output_bias": True, "model__attention__qk_norm": False, "model__tie_embeddings": True,
    },
    "hybrid": {
        "model__delta_net__pattern": (1, 1, 1, 0), "model__delta_net__num_key_heads": 4,
        "model__delta_net__num_value_heads": 12, "model__delta_net__key_head_dim": 10, "model__delta_net__value_head_dim": 7,
        "model__attention__output_gate": True, "model__norm": "zero_centered_rmsnorm", "model__norm_eps": 1e-3,
        "model__position__rotary_fraction": 0.5, "model__moe__shared_ffn_hidden_size": 40, "model__moe__shared_gate": True,
    },
    "post_norms": {
        "model__norm_position": "after", "model__attention__qk_norm": True, "model__attention__qk_norm_span": "all_heads",
        "model__moe__layer_pattern": (0, 1, 0, 1), "recompute__mode": "selective", "recompute__modules": ("mlp", "layernorm"),
    },
    "documents": {"data__document_mask": True, "recompute__mode": "full"},
}  # fmt: skip


@cache
def reference(keys: Keys) -> Trained:
    return run_ranks(1, train_small, small_config(**dict(keys)))[0]


def check(world: int, layout: dict[str, Any], model: dict[str, Any]) -> None:
    want = reference(tuple(model.items()))
    ranks = run_ranks(world, train_small, small_config(launch__processes_per_node=world, **layout, **model))
    for rank in ranks:
        assert rank.steps == ranks[0].steps, "all ranks report the same numbers"
    for (loss, norm, tokens, moe), (loss_1, norm_1, tokens_1, moe_1) in zip(ranks[0].steps, want.steps, strict=True):
        assert tokens == tokens_1
        assert loss == pytest.approx(loss_1, rel=1e-6)
        assert norm == pytest.approx(norm_1, rel=1e-5)
        assert moe == pytest.approx(moe_1, rel=1e-5)
    assert ranks[0].expert_counts == want.expert_counts
    check_expert_counts(want)
    assert ranks[0].valid == pytest.approx(want.valid, rel=1e-6)
    got_weights, want_weights = assemble([rank.weights for rank in ranks]), assemble([want.weights])
    if model.get("model__position__kind") == "learned":
        # Without rotation softmax does not see a key's bias: its gradient is rounding noise, which Adam makes steps of.
        for weights in (got_weights, want_weights):
            for key in [key for key in weights if key[1].endswith("linear_qkv.bias")]:
                del weights[key]
    difference, where = largest_difference(got_weights, want_weights)
    assert difference < 1e-4, f"{where} differs by {difference}"


def check_expert_counts(trained: Trained) -> None:
    """64 tokens choose 2 of 8 experts in each layer, and the counts are those of the metric."""
    for layers, (_, _, _, moe) in zip(trained.expert_counts, trained.steps, strict=True):
        assert all(sum(counts) == 2 * 64 and len(counts) == 8 for counts in layers)
        if layers:
            assert max(max(counts) / 16 for counts in layers) == pytest.approx(moe["expert_load_max_over_mean"])


@pytest.mark.parametrize(
    ("world", "layout"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, int) else "-".join(value)
)
def test_layout_changes_nothing(world: int, layout: dict[str, Any]) -> None:
    check(world, layout, {})


# The other kinds are rehearsed on these axes (tests/rehearse), and here on every layout by `make prove`.
@pytest.mark.parametrize("name", ["qwen2_moe_tied", "gpt3", "documents", "hybrid"])
def test_every_kind_of_model_on_composed_axes(name: str) -> None:
    model = MODELS[name]
    experts = model.get("model__moe__num_experts", 8)
    check(4, {TP: 2, PP: 2, EP: 2} if experts else {TP: 2, PP: 2}, model)


def changed_a_little(config: Config, size: float) -> list[float]:
    """On a forked rank: the gradient norms of a model whose initial weights are changed by this share."""
    build = world_module.make_model

    def made(*args: Any) -> Any:
        chunks, generator = build(*args), torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator))
        return chunks

    world_module.make_model = made
    return [norm for _, norm, *_ in train_small(config).steps]


@pytest.mark.prove
def test_small_epsilons_make_rounding_grow_in_gated_delta_nets() -> None:
    """One process, no layout: why rehearsals of hybrids raise model.norm_eps (tools/rehearse/shrink.py)."""
    grown = []
    for epsilon in (1e-6, 1e-5, 1e-3):
        config = small_config(**{**MODELS["hybrid"], "model__norm_eps": epsilon})
        (exact,), (changed,) = (run_ranks(1, changed_a_little, config, size) for size in (0.0, 1e-7))
        grown.append(max(abs(a - b) / a for a, b in zip(exact, changed, strict=True)))
    assert grown[0] > 1e-4 > grown[1] > 3e-6 and grown[2] < 1e-6


def test_context_ranks_share_the_heads_of_gated_delta_nets() -> None:
    check(4, {TP: 2, CP: 2}, MODELS["hybrid"])


@pytest.mark.prove
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("world", "layout"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, int) else "-".join(value)
)
def test_every_kind_of_model_on_every_layout(world: int, layout: dict[str, Any], name: str) -> None:
    model = MODELS[name]
    if not model.get("model__moe__num_experts", 8):
        layout = {axis: size for axis, size in layout.items() if axis not in (EP, ETP)}
    if model.get("model__mlp_bias") and layout.get(ETP, 1) > 1:
        pytest.skip("biases in experts split over tensor ranks are refused")
    check(world, layout, model)


@pytest.mark.parametrize(
    "name", ["deepseek", *(pytest.param(name, marks=pytest.mark.prove) for name in ("gpt_oss", "qwen2_moe_tied"))]
)
def test_experts_tokens_travel_beside_another_micro_batch(name: str) -> None:
    """Megatron-Core's schedule for it runs layers part by part: dense and MoE layers, prediction depths, shared experts."""
    check(4, {PP: 2, VPP: 2, EP: 2, "parallel__overlap_expert_comm": True}, MODELS[name])


def test_bf16_weights_follow_fp32_main_weights() -> None:
    """bf16 runs round differently by layout: loss to 1e-3, and the main weights are fp32 that bf16 rounds."""
    model = {"precision__params": "bf16"}
    want = reference(tuple(model.items()))
    ranks = run_ranks(4, train_small, small_config(launch__processes_per_node=4, **{TP: 2, PP: 2, EP: 2}, **model))
    assert [step[0] for step in ranks[0].steps] == pytest.approx([step[0] for step in want.steps], rel=1e-3)
    assert all(values.dtype == "float32" for values in ranks[0].weights.values())


def test_biases_of_experts_keep_bf16() -> None:
    """Weighted by fp32 router probabilities, a bias must not make the experts' output fp32. The loss is that of fp32 to 1%."""
    exact = reference(tuple(MODELS["gpt_oss"].items()))
    (rounded,) = run_ranks(1, train_small, small_config(precision__params="bf16", **MODELS["gpt_oss"]))
    assert [step[0] for step in rounded.steps] == pytest.approx([step[0] for step in exact.steps], rel=1e-2)


def test_grouped_and_separate_experts_are_the_same_model() -> None:
    """Same canonical names, same numbers: on the CPU the grouped product is taken where it can be."""
    want = reference(())
    (got,) = run_ranks(1, train_small, small_config(model__moe__grouped_gemm="off"))
    assert [step[:2] for step in got.steps] == [pytest.approx(step[:2], rel=1e-6) for step in want.steps]
    assert largest_difference(assemble([got.weights]), assemble([want.weights]))[0] < 1e-4


def test_padding_of_the_vocabulary_changes_nothing() -> None:
    """300 tokens padded to 384 and to 304: pads get no probability, so no gradient either."""
    want = reference(())
    (got,) = run_ranks(1, train_small, small_config(model__vocab_multiple=8))
    assert [step[:2] for step in got.steps] == [pytest.approx(step[:2], rel=1e-6) for step in want.steps]
    wide, narrow = assemble([want.weights]), assemble([got.weights])
    key = ("weight", "output_layer.weight")
    assert (wide[key].shape[0], narrow[key].shape[0]) == (384, 304)
    assert wide[key][:300] == pytest.approx(narrow[key][:300], rel=1e-3, abs=1e-6)
    assert not wide[("exp_avg", "output_layer.weight")][300:].any()


@pytest.mark.parametrize(
    "model",
    [
        {"model__moe__router__jitter_eps": 0.1, "model__hidden_dropout": 0.1, "model__attention__dropout": 0.1},
        {"model__moe__capacity_factor": 1.0, "model__moe__pad_to_capacity": True},
        {"model__moe__router__balance": "global_aux_loss"},
        {"model__moe__dispatcher": "allgather", "recompute__mode": "selective"},
    ],
    ids=lambda model: "-".join(key.split("__")[-1] for key in model),
)
def test_what_depends_on_the_layout_by_nature_still_trains(model: dict[str, Any]) -> None:
    ranks = run_ranks(2, train_small, small_config(launch__processes_per_node=2, **{TP: 2, EP: 2}, **model))
    losses = [step[0] for step in ranks[0].steps]
    assert losses == [step[0] for step in ranks[1].steps]
    assert all(4 < loss < 9 for loss in losses)
    assert all(rank.validates_quietly for rank in ranks)


# Guards: without each, a composed layout is silently wrong.


def gradients_differ(world: int, layout: dict[str, Any], model: dict[str, Any]) -> float:
    """Largest relative difference of any first-step gradient against one process, or of the gradient norm."""
    model = {**model, "zero__stage": 0, "run__steps": 1}
    want = run_ranks(1, train_small, small_config(**model), True)[0]
    ranks = run_ranks(world, train_small, small_config(launch__processes_per_node=world, **layout, **model), True)
    difference, _ = largest_difference(assemble([rank.gradients for rank in ranks]), assemble([want.gradients]))
    norm, norm_1 = ranks[0].steps[0][1], want.steps[0][1]
    return max(difference, abs(norm - norm_1) / norm_1)


def unmarked(*args: Any) -> None:
    """Stands where a guard stood."""


@pytest.mark.parametrize(
    ("layout", "model"),
    [({TP: 2}, {}), ({TP: 2, EP: 2}, MODELS["gpt_oss"])],
    ids=["expert gradients reduced over data ranks only", "expert biases summed and counted wrongly"],
)
def test_expert_guard(layout: dict[str, Any], model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradients_differ(2, layout, model) < 1e-5
    monkeypatch.setattr("pretrain.build.mark_expert_parameters", unmarked)
    assert gradients_differ(2, layout, model) > 1e-3
    assert guards.mark_expert_parameters is not unmarked


@pytest.mark.parametrize("layout", [{TP: 2}, {CP: 2}], ids=["tensor", "context"])
def test_router_losses_guard(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core up to 0.18 weighs auxiliary losses by the rank's own tokens; later versions do not, and need no guard."""
    model = {"model__moe__router__z_loss_coeff": 0.01, "model__moe__router__aux_loss_coeff": 0.5}
    assert gradients_differ(2, layout, model) < 1e-5
    needed = is_needed("Router losses are weighted by the rank's own tokens when the loss is a sum over tokens")
    monkeypatch.setattr(megatron_config, "router_loss_weight", lambda _: 1)
    assert (gradients_differ(2, layout, model) > 1e-3) == needed
    # A guard that stays on where the fault is gone is a fault itself.
    monkeypatch.setattr(megatron_config, "router_loss_weight", lambda layout: layout.tensor * layout.context)
    assert (gradients_differ(2, layout, model) < 1e-5) == needed


def test_jitter_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core adds the router's noise to validation too, with random numbers that training would have used."""
    monkeypatch.setattr("pretrain.engine.schedule_step.without_jitter", lambda models: nullcontext())
    (rank,) = run_ranks(1, train_small, small_config(model__moe__router__jitter_eps=0.1, run__steps=1))
    assert not rank.validates_quietly


def test_latent_attention_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's local spec splits MLA's down projections, and the gradient is wrong with tensor > 1."""
    monkeypatch.setattr("pretrain.model.specs.ReplicatedLinear", ColumnParallelLinear)
    model = {**MODELS["deepseek"], "model__mtp__num_layers": 0}
    assert gradients_differ(2, {TP: 2}, model) > 1e-3
