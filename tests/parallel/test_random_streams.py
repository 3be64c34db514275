"""Random streams: which ranks draw alike, and that a layout's states are not taken by another one."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from configs.schema import Config
from parallel.groups import current_degrees, make_groups
from parallel.layout import make_layout
from parallel.random_streams import stream_seed
from parallel.runtime import start
from pretrain.checkpoint.random_state import random_state, read_random_state
from tests.pretrain.engine.test_deepspeed_state import make
from tests.pretrain.model.test_parity import CP, PP, TP
from tests.pretrain.world import batches_of, small_config
from tests.ranks import run_ranks


def test_every_place_has_its_seed() -> None:
    places = list(product(range(16), range(64), range(4)))
    seeds = {stream_seed(1234, *place) for place in places} | {stream_seed(1235, *place) for place in places}
    assert len(seeds) == 2 * len(places)
    # Megatron-Core adds up to 2718 + the tensor rank.
    ordered = sorted(seeds)
    assert min(b - a for a, b in pairwise(ordered)) > 10_000 and ordered[-1] < 2**57


def draws(config: Config) -> tuple[tuple[int, int, int, int], list[float], list[float]]:
    """(place in the layout, numbers drawn outside and inside of the tensor ranks' stream)."""
    start({"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())})
    groups = make_groups(make_layout(config), config.run.seed)
    shared = torch.rand(4).tolist()
    streams: Any = get_cuda_rng_tracker()
    with streams.fork():
        split = torch.rand(4).tolist()
    return (groups.pp.rank(), groups.dp.rank(), groups.cp.rank(), groups.tp.rank()), shared, split


@pytest.mark.parametrize("axes", [{PP: 2, TP: 2}, {CP: 2, TP: 2}, {TP: 2}, {}], ids=lambda axes: "-".join(axes) or "data")
def test_ranks_draw_alike_exactly_where_they_hold_the_same(axes: dict[str, int]) -> None:
    """4 ranks: tensor ranks share one stream and have another each; all others differ in both."""
    found = run_ranks(4, draws, small_config(launch__processes_per_node=4, **axes))
    for (place, shared, split), (place_2, shared_2, split_2) in product(found, repeat=2):
        assert (shared == shared_2) is (place[:3] == place_2[:3])
        assert (split == split_2) is (place == place_2)


def masks(config: Config) -> list[list[bool]]:
    """What a rank's dropout let through in one step: every mask that torch drew."""
    engine, groups = make(config)
    found: list[list[bool]] = []
    dropout = torch.nn.functional.dropout

    def watched(values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        result = dropout(values, p, training, inplace)
        if training and p > 0:
            found.append((result != 0).flatten()[:64].tolist())
        return result

    torch.nn.functional.dropout = watched
    engine.step(batches_of(config, 0, groups.dp.rank(), groups.dp.size()), 0.0)
    return found


@pytest.mark.parametrize("axes", [{}, {PP: 2}, {CP: 2}, {TP: 2}], ids=["data", "pipeline", "context", "tensor"])
def test_no_two_dropout_masks_are_equal(axes: dict[str, int]) -> None:
    """Of hidden states, over all ranks, layers and micro-batches. Tensor ranks hold other tokens (sequence parallelism)."""
    ranks = run_ranks(2, masks, small_config(launch__processes_per_node=2, model__hidden_dropout=0.5, **axes))
    drawn = [tuple(mask) for rank in ranks for mask in rank]
    assert len(drawn) > 8 and len(set(drawn)) == len(drawn)


def attention_outputs(config: Config) -> float:
    """How much the heads of this rank's first layer agree in what dropout left of equal values."""
    engine, groups = make(config)
    model: Any = engine
    attention = model.models[0].module.decoder.layers[0].self_attention.core_attention
    torch.manual_seed(groups.dp.rank())
    query = torch.zeros(16, 1, attention.config.num_attention_heads // groups.tp.size(), 12)
    value = torch.ones_like(query)
    out = attention(query, query, value, None)
    return float(out.double().mean())


def test_heads_of_tensor_ranks_have_masks_of_their_own_without_sequence_parallelism() -> None:
    dense = {"model__moe__num_experts": 0, "parallel__sequence": False, "model__attention__dropout": 0.5}
    first, second = run_ranks(2, attention_outputs, small_config(launch__processes_per_node=2, **{TP: 2}, **dense))
    assert first != second


class Reader:
    """A checkpoint that another layout wrote, as `read_random_state` asks it."""

    def __init__(self, layout: dict[str, int], world_size: int) -> None:
        self.manifest = self
        self.layout, self.world_size = layout, world_size

    def has(self, kind: str) -> bool:
        return True

    def fill(self, state_slices: list[Any]) -> None: ...


def taken(config: Config) -> list[bool]:
    make(config)
    mine = current_degrees()
    others = [mine, {**mine, "data": 1, "tensor": 2}, {**mine, "data": 1, "pipeline": 2}]
    assert random_state()
    return [read_random_state(Reader(layout, 2)) is not None for layout in others]  # type: ignore[arg-type]


def test_states_of_another_layout_are_not_taken() -> None:
    assert run_ranks(2, taken, small_config(launch__processes_per_node=2)) == [[True, False, False]] * 2
