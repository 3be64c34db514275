"""State under DeepSpeed's engine: every stage takes what the other engine wrote, bit by bit, and goes on."""

from __future__ import annotations

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
from pretrain.build import make_engine, make_model
from pretrain.engine.base import WEIGHT, Engine
from tests.pretrain.deepspeed_world import Keys, name_of, zero
from tests.pretrain.model.test_parity import EP, PP, TP
from tests.pretrain.world import VOCAB, assemble, batches_of, largest_difference, owned_values, small_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("deepspeed_imported")


def make(config: Config) -> tuple[Engine, ProcessGroupCollection]:
    layout = make_layout(config)
    runtime = start({"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())})
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, VOCAB, config.parallel.pipeline_split)
    groups = make_groups(layout, config.run.seed)
    model = make_model(config, VOCAB, layout, chunks, groups, runtime.device)
    return make_engine(config, model, groups, runtime.device), groups


def fill(engine: Engine, whole: dict[tuple[str, str], np.ndarray], with_optimizer: bool, steps: int | None) -> None:
    """What restoring a checkpoint does, from memory."""
    for state_slice in engine.local_state(with_optimizer):
        slice_ = state_slice.tensor_slice
        values = whole[state_slice.kind, state_slice.name][
            slice_.slices_of(type(slice_)((0,) * len(state_slice.global_shape), state_slice.global_shape))
        ]
        with torch.no_grad():
            state_slice.data.copy_(torch.from_numpy(values.flatten()[state_slice.start : state_slice.stop].copy()))
    engine.loaded(steps)


def go_on(config: Config, whole: dict[tuple[str, str], np.ndarray] | None, first: int, last: int, optimizer: bool = True) -> Any:
    """Steps [first, last) from a state; (slices before, losses, slices after)."""
    engine, groups = make(config)
    if whole is not None:
        fill(engine, whole, optimizer, first if optimizer else None)
    before = owned_values(engine)
    losses = [engine.step(batches_of(config, step, groups.dp.rank(), groups.dp.size()), 3e-3).loss for step in range(first, last)]
    assert engine.optimizer_steps() == (last if optimizer else last - first)
    return before, losses, owned_values(engine)


def spread(world: int, keys: Keys, *args: Any) -> tuple[dict[Any, np.ndarray], list[float], dict[Any, np.ndarray]]:
    ranks = run_ranks(world, go_on, small_config(launch__processes_per_node=world, **keys), *args)
    return assemble([rank[0] for rank in ranks]), ranks[0][1], assemble([rank[2] for rank in ranks])


STATES: list[tuple[int, Keys]] = [
    (2, {EP: 2, **zero(0)}),
    (2, zero(1)),
    (2, {TP: 2, **zero(2)}),
    (4, {PP: 2, **zero(3)}),
    (2, {"zero__engine": "megatron", "zero__stage": 1}),
    # DeepSpeed's CPU Adam where it can be compiled.
    pytest.param(2, zero(2, zero__offload="optimizer"), marks=pytest.mark.prove),  # type: ignore[list-item]
]


def same(got: dict[Any, np.ndarray], want: dict[Any, np.ndarray]) -> bool:
    assert got.keys() == want.keys()
    return all(np.array_equal(got[key], want[key]) for key in want)


@pytest.fixture(scope="module")
def trained() -> dict[Any, np.ndarray]:
    """The state after 2 steps of Megatron's engine on one rank."""
    return spread(1, {}, None, 0, 2)[2]


@pytest.mark.prove
@pytest.mark.parametrize(("world", "keys"), STATES, ids=name_of)
def test_the_other_engines_state_is_taken_bit_by_bit(world: int, keys: Keys, trained: dict[Any, np.ndarray]) -> None:
    before, losses, after = spread(world, keys, trained, 2, 3)
    assert same(before, trained)
    _, want_losses, want = spread(1, {}, trained, 2, 3)
    assert losses == pytest.approx(want_losses, rel=1e-6)
    assert largest_difference(after, want)[0] < 1e-5
    assert same(spread(1, {}, after, 3, 3)[0], after), "and Megatron's engine takes it back"


@pytest.mark.parametrize(
    ("world", "keys"),
    [pytest.param(2, {EP: 2, **zero(2)}, marks=pytest.mark.prove), (2, zero(3, precision__params="bf16"))],
    ids=name_of,
)
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
        states.append(owned_values(engine))
    untouched = all(np.array_equal(states[0][key], states[1][key]) for key in states[0])
    return [result.applied for result in results], untouched, results[2].loss


@pytest.mark.parametrize("keys", [zero(0), zero(1, zero__offload="optimizer"), zero(2), zero(3)], ids=name_of)
def test_a_step_that_is_not_finite_changes_nothing(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.engine.deepspeed_runtime.can_compile", lambda: False)
    ranks = run_ranks(2, spoiled, small_config(launch__processes_per_node=2, **{EP: 2}, **keys))
    assert all(applied == [True, False, True] and untouched for applied, untouched, _ in ranks)
    want = run_ranks(1, spoiled, small_config(zero__stage=0))[0]
    assert ranks[0][2] == pytest.approx(want[2], rel=1e-6)
