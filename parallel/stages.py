"""Which layers stand on which pipeline stage: one home, read by the engine, the checks and the planner.

In: model, degrees, an optional explicit split. Out: frozen `Chunk`s in model order; chunk c of stage s is at c·pp + s.

Cost model (balance only; no result depends on it). A layer costs the weights of its active matrix products. The head
with its loss costs hidden x padded vocabulary, each prediction depth one layer, its 2h x h product and the head again.
The embedding does no product, but its weights and optimizer state lie on the first stage, which also holds the most
activations in 1F1B: it counts as a quarter of the head. The largest chunk is made as small as possible, then the sum of
squares. The products of queries and keys and those with the state of a gated delta net are left out.

Torch-free.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from configs.model_schema import Model
from parallel.architecture import layer_kinds, layer_products, mtp_kind, padded_vocab


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of one stage. `layers` are indices from 0 in the whole model; `mtp` prediction depths follow them."""

    stage: int
    chunk: int
    layers: tuple[int, ...]
    embedding: bool
    head: bool
    mtp: int


@dataclass(frozen=True)
class Costs:
    """Work of each part, in weights multiplied per token."""

    layers: tuple[int, ...]
    embedding: int
    tail: int  # head with loss, and prediction depths


def costs_of(model: Model, vocab_size: int) -> Costs:
    """The cost model above for this model."""
    layers = tuple(layer_products(model, kind).total for kind in layer_kinds(model))
    head = model.hidden_size * padded_vocab(model, vocab_size)
    depth = layer_products(model, mtp_kind(model)).total + 2 * model.hidden_size**2 + head
    return Costs(layers, head // 4, head + model.mtp.num_layers * depth)


def balanced_split(costs: Costs, num_chunks: int) -> list[int]:
    """Layers of each chunk in model order, at least one each. Needs num_chunks <= layers."""
    num_layers = len(costs.layers)
    assert 1 <= num_chunks <= num_layers, f"{num_layers} layers can't fill {num_chunks} chunks: check_config comes first"
    before = [0, *accumulate(costs.layers)]

    def cost(first: int, end: int) -> int:
        """Work of the chunk of layers [first, end)."""
        ends = (costs.embedding if first == 0 else 0) + (costs.tail if end == num_layers else 0)
        return before[end] - before[first] + ends

    limit = _smallest_limit(cost, num_layers, num_chunks)
    # best[end] = (sum of squares, split) of the chunks so far over layers [0, end); only chunks within the limit.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for index in range(num_chunks):
        left = num_chunks - 1 - index
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        # The chunks still to come must be able to hold what is left.
        earliest = bisect_left(before, before[num_layers] + costs.tail - left * limit) if left else num_layers
        for first, (square, split) in best.items():
            for end in range(max(first + 1, earliest), num_layers - left + 1):
                work = cost(first, end)
                if work > limit:
                    break
                candidate = (square + work**2, (*split, end - first))
                if end not in reached or candidate < reached[end]:
                    reached[end] = candidate
        best = reached
    return list(best[num_layers][1])


def _smallest_limit(cost: Callable[[int, int], int], num_layers: int, num_chunks: int) -> int:
    """The smallest possible cost of the largest chunk, by bisection over a greedy filling."""

    def fits(limit: int) -> bool:
        first = 0
        for index in range(num_chunks):
            end, last_end = first + 1, num_layers - (num_chunks - 1 - index)
            if index == num_chunks - 1:
                end = num_layers
            while end < last_end and cost(first, end + 1) <= limit:
                end += 1
            if cost(first, end) > limit:
                return False
            first = end
        return first == num_layers

    low, high = 0, cost(0, num_layers)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def make_chunks(
    model: Model, pipeline: int, virtual_pipeline: int, vocab_size: int, pipeline_split: Sequence[int] | None = None
) -> tuple[Chunk, ...]:
    """The chunks of a legal config in model order. `pipeline_split`: layers of each chunk, instead of the balance."""
    num_chunks = pipeline * virtual_pipeline
    sizes = list(pipeline_split) if pipeline_split is not None else balanced_split(costs_of(model, vocab_size), num_chunks)
    assert len(sizes) == num_chunks and sum(sizes) == model.num_layers, f"split {sizes} is not legal: check_config comes first"
    ends = list(accumulate(sizes))
    last = num_chunks - 1
    return tuple(
        Chunk(
            stage=index % pipeline,
            chunk=index // pipeline,
            layers=tuple(range(end - size, end)),
            embedding=index == 0,
            head=index == last,
            mtp=model.mtp.num_layers if index == last else 0,
        )
        for index, (size, end) in enumerate(zip(sizes, ends))
    )


def megatron_pipeline_layout(chunks: Sequence[Chunk]) -> list[list[str]]:
    """TransformerConfig.pipeline_model_parallel_layout: for each chunk in model order, the names of its parts."""
    return [
        ["embedding"] * chunk.embedding + ["decoder"] * len(chunk.layers) + ["mtp"] * chunk.mtp + ["loss"] * chunk.head
        for chunk in chunks
    ]
