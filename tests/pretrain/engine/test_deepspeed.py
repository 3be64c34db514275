"""DeepSpeed's engine against Megatron's in one process: every stage on composed axes, kinds of model, bf16, offload."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.pretrain.deepspeed_world import Keys, name_of, zero
from tests.pretrain.model.test_parity import CP, EP, ETP, MODELS, PP, TP, VPP, check
from tests.pretrain.world import small_config, train_small
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

# Parity.

LAYOUTS: list[tuple[int, Keys]] = [
    (1, zero(0)),
    (2, zero(2)),
    (2, {EP: 2, **zero(3)}),
    (2, {CP: 2, **zero(2)}),
    (2, {TP: 2, ETP: 2, **zero(3)}),
    (2, {PP: 2, VPP: 2, **zero(3)}),
    (4, {TP: 2, PP: 2, EP: 2, **zero(1)}),
    (4, {PP: 2, CP: 2, EP: 2, **zero(3)}),
]
MORE_LAYOUTS: list[tuple[int, Keys]] = [
    (world, {**axes, **zero(stage)})
    for stage in range(4)
    for world, axes in [
        (2, {}), (2, {EP: 2}), (2, {TP: 2}), (2, {TP: 2, ETP: 2}), (2, {CP: 2}), (2, {PP: 2}), (2, {PP: 2, VPP: 2}),
        (4, {TP: 2, EP: 4}), (4, {TP: 2, PP: 2, EP: 2}), (8, {TP: 2, PP: 2, CP: 2, EP: 2}),
    ]
]  # fmt: skip


# `make test` rehearses every legal pair of axis values under both engines (tests/rehearse).
@pytest.mark.prove
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=name_of)
def test_layout_changes_nothing(world: int, layout: Keys) -> None:
    check(world, layout, {})


@pytest.mark.prove
@pytest.mark.parametrize(("world", "layout"), MORE_LAYOUTS, ids=name_of)
def test_more_layouts_change_nothing(world: int, layout: Keys) -> None:
    check(world, layout, {})


@pytest.mark.parametrize(("name", "stage"), [("deepseek", 3), pytest.param("documents", 2, marks=pytest.mark.prove)])
def test_kinds_of_model_on_composed_axes(name: str, stage: int) -> None:
    check(4, {TP: 2, PP: 2, EP: 2, **zero(stage)}, MODELS[name])


@pytest.mark.prove
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_at_every_stage(name: str, stage: int) -> None:
    experts = MODELS[name].get("model__moe__num_experts", 8)
    check(4, {TP: 2, PP: 2, **({EP: 2} if experts else {}), **zero(stage)}, MODELS[name])


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.prove), pytest.param(2, marks=pytest.mark.prove), 3])
def test_bf16_keeps_fp32_main_weights(stage: int) -> None:
    """bf16 rounds differently by layout: loss to 1e-3; what a checkpoint gets is fp32."""
    bf16 = {"precision__params": "bf16"}
    want = run_ranks(1, train_small, small_config(**bf16))[0]
    ranks = run_ranks(2, train_small, small_config(launch__processes_per_node=2, **{EP: 2}, **zero(stage), **bf16))
    assert [step[0] for step in ranks[0].steps] == pytest.approx([step[0] for step in want.steps], rel=1e-3)
    for rank in ranks:
        assert all(values.dtype == np.float32 for values in rank.weights.values())


@pytest.mark.prove
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients(stage: int) -> None:
    bf16 = {"precision__params": "bf16", "precision__grads": "bf16"}
    want = run_ranks(1, train_small, small_config(**bf16))[0]
    ranks = run_ranks(2, train_small, small_config(launch__processes_per_node=2, **{EP: 2}, **zero(stage), **bf16))
    assert [step[0] for step in ranks[0].steps] == pytest.approx([step[0] for step in want.steps], rel=2e-3)


OFFLOADS = [zero(1, zero__offload="optimizer"), zero(2, zero__offload="optimizer"), zero(3, zero__offload="param")]


# Rehearsed every day under the layouts that hold every legal pair (tests/tools/rehearse).
@pytest.mark.prove
@pytest.mark.parametrize("offload", OFFLOADS, ids=name_of)
def test_offload_with_torch_adam(offload: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.engine.deepspeed_runtime.can_compile", lambda: False)
    check(2, {EP: 2, **offload}, {})


def test_offload_under_virtual_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first backward pass of a step reaches only some of the gradients that the host adds up."""
    monkeypatch.setattr("pretrain.engine.deepspeed_runtime.can_compile", lambda: False)
    check(2, {PP: 2, VPP: 2, **zero(2, zero__offload="optimizer")}, {})


@pytest.mark.prove
@pytest.mark.skipif(not (shutil.which("ninja") and shutil.which("g++")), reason="DeepSpeed's CPU Adam is compiled")
@pytest.mark.parametrize("offload", OFFLOADS, ids=name_of)
def test_offload_with_cpu_adam(offload: Keys) -> None:
    check(2, {EP: 2, **offload}, {})
