"""DeepSpeed's engine against Megatron's in one process: every stage on composed axes, state that both read, and its guards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from configs.schema import Config
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from parallel.zero_table import COSTS, FEATURES, REFUSED, STAGES, lookup, rows
from pretrain.build import make_engine, make_model
from pretrain.engine.base import MOMENTS, WEIGHT, Engine
from tests.pretrain.test_parity import CP, EP, ETP, MODELS, PP, TP, VPP, check
from tests.pretrain.world import VOCAB, assemble, batches_of, largest_difference, small_config, train_small
from tests.ranks import RankFailed, run_ranks

Keys = dict[str, Any]
BOTH = (*MOMENTS, WEIGHT)


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """Forked ranks find DeepSpeed imported (3 s)."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import pretrain.engine.deepspeed  # noqa: F401, PLC0415  (after the line above)


def zero(stage: int, **more: Any) -> Keys:
    return {"zero__engine": "deepspeed", "zero__stage": stage, **more}


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


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key.split('__')[1]}{size}" for key, size in value.items() if key != "zero__engine")
    return str(value)


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=name_of)
def test_layout_changes_nothing(world: int, layout: Keys) -> None:
    check(world, layout, {})


@pytest.mark.prove
@pytest.mark.parametrize(("world", "layout"), MORE_LAYOUTS, ids=name_of)
def test_more_layouts_change_nothing(world: int, layout: Keys) -> None:
    check(world, layout, {})


@pytest.mark.parametrize(("name", "stage"), [("deepseek", 3), ("qwen2_moe_tied", 2), ("documents", 3)])
def test_kinds_of_model_on_composed_axes(name: str, stage: int) -> None:
    check(4, {TP: 2, PP: 2, EP: 2, **zero(stage)}, MODELS[name])


@pytest.mark.prove
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_at_every_stage(name: str, stage: int) -> None:
    experts = MODELS[name].get("model__moe__num_experts", 8)
    check(4, {TP: 2, PP: 2, **({EP: 2} if experts else {}), **zero(stage)}, MODELS[name])


@pytest.mark.parametrize("stage", [1, 2, 3])
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


@pytest.mark.parametrize("offload", OFFLOADS, ids=name_of)
def test_offload_with_torch_adam(offload: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.engine.deepspeed_runtime.can_compile", lambda: False)
    check(2, {EP: 2, **offload}, {})


@pytest.mark.prove
@pytest.mark.skipif(not (shutil.which("ninja") and shutil.which("g++")), reason="DeepSpeed's CPU Adam is compiled")
@pytest.mark.parametrize("offload", OFFLOADS, ids=name_of)
def test_offload_with_cpu_adam(offload: Keys) -> None:
    check(2, {EP: 2, **offload}, {})


# State.


def make(config: Config) -> tuple[Engine, ProcessGroupCollection]:
    layout = make_layout(config)
    runtime = start({"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())})
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, VOCAB, config.parallel.pipeline_split)
    groups = make_groups(layout, config.run.seed)
    model = make_model(config, VOCAB, layout, chunks, groups, runtime.device)
    return make_engine(config, model, groups, runtime.device), groups


def slices(engine: Engine) -> dict[Any, np.ndarray]:
    return {
        (piece.kind, piece.name, piece.global_shape, piece.box, piece.start, piece.stop): piece.data.detach().clone().numpy()
        for piece in engine.owned()
    }


def fill(engine: Engine, whole: dict[tuple[str, str], np.ndarray], with_optimizer: bool, steps: int | None) -> None:
    """What restoring a checkpoint does, from memory."""
    for piece in engine.held(with_optimizer):
        box = piece.box
        values = whole[piece.kind, piece.name][box.slices_of(type(box)((0,) * len(piece.global_shape), piece.global_shape))]
        with torch.no_grad():
            piece.data.copy_(torch.from_numpy(values.flatten()[piece.start : piece.stop].copy()))
    engine.loaded(steps)


def go_on(config: Config, whole: dict[tuple[str, str], np.ndarray] | None, first: int, last: int, optimizer: bool = True) -> Any:
    """Steps [first, last) from a state; (slices before, losses, slices after)."""
    engine, groups = make(config)
    if whole is not None:
        fill(engine, whole, optimizer, first if optimizer else None)
    before = slices(engine)
    losses = [engine.step(batches_of(config, step, groups.dp.rank(), groups.dp.size()), 3e-3).loss for step in range(first, last)]
    assert engine.optimizer_steps() == (last if optimizer else last - first)
    return before, losses, slices(engine)


def spread(world: int, keys: Keys, *args: Any) -> tuple[dict[Any, np.ndarray], list[float], dict[Any, np.ndarray]]:
    ranks = run_ranks(world, go_on, small_config(launch__processes_per_node=world, **keys), *args)
    return assemble([rank[0] for rank in ranks]), ranks[0][1], assemble([rank[2] for rank in ranks])


STATES: list[tuple[int, Keys]] = [
    (2, {EP: 2, **zero(0)}),
    (2, zero(1)),
    (2, {TP: 2, **zero(2)}),
    (4, {PP: 2, **zero(3)}),
    (2, {"zero__engine": "megatron", "zero__stage": 1}),
]


def same(got: dict[Any, np.ndarray], want: dict[Any, np.ndarray]) -> bool:
    assert got.keys() == want.keys()
    return all(np.array_equal(got[key], want[key]) for key in want)


@pytest.fixture(scope="module")
def trained() -> dict[Any, np.ndarray]:
    """The state after 2 steps of Megatron's engine on one rank."""
    return spread(1, {}, None, 0, 2)[2]


@pytest.mark.parametrize(("world", "keys"), STATES, ids=name_of)
def test_the_other_engines_state_is_taken_bit_by_bit(world: int, keys: Keys, trained: dict[Any, np.ndarray]) -> None:
    before, losses, after = spread(world, keys, trained, 2, 3)
    assert same(before, trained)
    _, want_losses, want = spread(1, {}, trained, 2, 3)
    assert losses == pytest.approx(want_losses, rel=1e-6)
    assert largest_difference(after, want)[0] < 1e-5
    assert same(spread(1, {}, after, 3, 3)[0], after), "and Megatron's engine takes it back"


@pytest.mark.parametrize(("world", "keys"), [(2, {EP: 2, **zero(2)}), (2, zero(3, precision__params="bf16"))], ids=name_of)
def test_stopping_and_going_on_equals_going_through(world: int, keys: Keys) -> None:
    """Bit by bit on the same layout."""
    half = spread(world, keys, None, 0, 2)[2]
    _, losses, resumed = spread(world, keys, half, 2, 4)
    _, all_losses, through = spread(world, keys, None, 0, 4)
    assert losses == all_losses[2:] and same(resumed, through)


def test_weights_alone_start_a_fresh_optimizer(trained: dict[Any, np.ndarray]) -> None:
    weights = {key: value for key, value in trained.items() if key[0] == WEIGHT}
    before, losses, _ = spread(2, zero(3), weights, 2, 3, False)
    assert same({key: before[key] for key in weights}, weights)
    assert losses == pytest.approx(spread(1, {}, weights, 2, 3, False)[1], rel=1e-6)


def spoiled(config: Config) -> Any:
    """A good step, one whose loss overflows, a good one: which were applied, whether the second left all as it was, losses."""
    engine, groups = make(config)
    results, states = [], []
    for step in range(3):
        batches = batches_of(config, step, groups.dp.rank(), groups.dp.size())
        if step == 1:
            batches[0].loss_mask[0, 0] = 3e38
        results.append(engine.step(batches, 3e-3))
        states.append(slices(engine))
    untouched = all(np.array_equal(states[0][key], states[1][key]) for key in states[0])
    return [result.applied for result in results], untouched, results[2].loss


@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_is_not_finite_changes_nothing(stage: int) -> None:
    ranks = run_ranks(2, spoiled, small_config(launch__processes_per_node=2, **{EP: 2}, **zero(stage)))
    assert all(applied == [True, False, True] and untouched for applied, untouched, _ in ranks)
    want = run_ranks(1, spoiled, small_config(zero__stage=0))[0]
    assert ranks[0][2] == pytest.approx(want[2], rel=1e-6)


# Guards: without each, a composed layout is silently wrong, or stands still.


def differs(world: int, keys: Keys, timeout_s: float = 60.0) -> bool:
    """True when the layout trains otherwise than one process, or fails."""
    want = run_ranks(1, train_small, small_config())[0]
    try:
        ranks = run_ranks(world, train_small, small_config(launch__processes_per_node=world, **keys), timeout_s=timeout_s)
    except RankFailed:
        return True
    norms, norms_1 = [step[1] for step in ranks[0].steps], [step[1] for step in want.steps]
    if norms != pytest.approx(norms_1, rel=1e-4):
        return True
    return largest_difference(assemble([rank.weights for rank in ranks]), assemble([want.weights]))[0] > 1e-3


def no_sum(*args: Any) -> None:
    """Stands where a sum over tensor ranks or stages stood."""


def managed(settings: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: {**settings(*args), "gradient_accumulation_steps": 4, "managed_gradient_accumulation": True}


def unguarded(name: str, patch: pytest.MonkeyPatch) -> None:
    from pretrain.engine import deepspeed_runtime as runtime  # noqa: PLC0415  (after the fixture)
    from pretrain.engine import deepspeed_slots as held  # noqa: PLC0415

    if name == "experts partitioned over all data ranks":
        patch.setattr(runtime, "place_experts", lambda *args: False)
        patch.setattr("pretrain.build.mark_expert_parameters", lambda *args: None)
    elif name == "backward passes in a row":
        patch.delattr(runtime.GuardedEngine, "_backward_prologue")
    elif name == "gradients of the step before":
        patch.delattr(held.CutParameters, "begin")
    elif name == "norms summed over tensor ranks":
        patch.setattr("pretrain.engine.deepspeed_gradients.sum_over_tensor_ranks", no_sum)
    elif name == "no update at all":
        patch.setattr(runtime, "engine_settings", managed(runtime.engine_settings))
    elif name == "stages compare their modules":
        patch.setattr(runtime, "compare_orders_within", lambda *args: None)


GUARDS: list[tuple[str, int, Keys]] = [
    ("experts partitioned over all data ranks", 2, {EP: 2, **zero(3)}),
    ("backward passes in a row", 2, {PP: 2, **zero(2)}),
    ("backward passes in a row", 2, {PP: 2, **zero(3)}),
    ("gradients of the step before", 2, {PP: 2, VPP: 2, **zero(3)}),
    ("norms summed over tensor ranks", 2, {TP: 2, **zero(1)}),
    ("no update at all", 1, zero(1)),
    pytest.param("stages compare their modules", 2, {PP: 2, **zero(3)}, marks=pytest.mark.prove),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("fault", "world", "keys"), GUARDS, ids=name_of)
def test_guard(fault: str, world: int, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    unguarded(fault, monkeypatch)
    assert differs(world, keys, timeout_s=30.0)


def test_copies_of_the_embedding_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.engine.deepspeed_gradients.SharedEmbedding.reduce", no_sum)
    with pytest.raises(AssertionError):
        check(2, {PP: 2, **zero(1)}, {"model__tie_embeddings": True})


def optimizer_kind(config: Config) -> str:
    engine: Any = make(config)[0]
    return type(engine.runtime.optimizer).__name__


def test_stage_1_in_bf16_is_partitioned_like_the_others() -> None:
    """DeepSpeed would take BF16_Optimizer, whose state and norm are other ones."""
    assert run_ranks(1, optimizer_kind, small_config(precision__params="bf16", **zero(1)))[0] == "DeepSpeedZeroOptimizer"


# The table.


def test_every_entry_names_a_feature_and_a_way_out() -> None:
    for name, cells in rows():
        assert name in FEATURES
        for (engine, stage), entry in cells.items():
            assert stage in STAGES[engine]
            assert entry.verdict != REFUSED or entry.fix
            assert entry.verdict not in (REFUSED, COSTS) or entry.why


def every_cell() -> Iterator[tuple[str, int, str]]:
    for engine, stages in STAGES.items():
        for stage in stages:
            yield from ((engine, stage, feature) for feature in FEATURES)


def test_the_table_has_a_cell_for_everything() -> None:
    assert all(lookup(*cell).feature == cell[2] for cell in every_cell())
