"""The split into stages: complete, in order, balanced, and in the form that megatron-core reads."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from configs.model_schema import Model, MoE, MultiToken
from parallel.stages import Costs, balanced_split, costs_of, make_chunks, megatron_pipeline_layout


def model_of(layers: int, mtp: int = 0) -> Model:
    moe = MoE(num_experts=8, top_k=2, ffn_hidden_size=32, first_dense_layers=min(2, layers - 1))
    return Model(num_layers=layers, moe=moe, mtp=MultiToken(num_layers=mtp))


CASES = [
    (layers, pp, vpp, mtp)
    for layers, pp, vpp, mtp in product((1, 2, 3, 4, 6, 7, 8, 13, 24, 61), (1, 2, 3, 4, 8), (1, 2, 3), (0, 1, 2))
    if layers >= pp * vpp and (vpp == 1 or pp > 1)
]


@pytest.mark.parametrize(("layers", "pp", "vpp", "mtp"), CASES)
def test_chunks_are_the_model_in_order_and_megatron_reads_them(layers: int, pp: int, vpp: int, mtp: int) -> None:
    chunks = make_chunks(model_of(layers, mtp), pp, vpp, vocab_size=2000)
    assert [layer for chunk in chunks for layer in chunk.layers] == list(range(layers))
    assert all(chunk.layers for chunk in chunks)
    assert [(chunk.chunk, chunk.stage) for chunk in chunks] == [(c, s) for c in range(vpp) for s in range(pp)]
    assert [chunk.embedding for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.head for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    theirs: Any = PipelineParallelLayerLayout(megatron_pipeline_layout(chunks), pp)
    theirs.validate_layer_layout(num_layers=layers, mtp_num_layers=mtp or None)
    assert theirs.virtual_pipeline_model_parallel_size == vpp
    for chunk in chunks:
        ids = theirs.get_layer_id_list(LayerType.decoder, vp_stage=chunk.chunk, pp_rank=chunk.stage) if vpp == 1 else None
        assert ids is None or ids == list(chunk.layers)
        assert theirs.layout[chunk.stage][chunk.chunk].count(LayerType.decoder) == len(chunk.layers)


@pytest.mark.parametrize("seed", range(40))
def test_the_largest_chunk_is_as_small_as_any_split_allows(seed: int) -> None:
    state = seed
    layers = []
    for _ in range(8):
        state = (state * 1103515245 + 12345) % 2**31
        layers.append(1 + state // 65536 % 9)
    costs = Costs(tuple(layers), embedding=seed % 5, tail=seed % 7)

    def work(cuts: tuple[int, ...]) -> list[int]:
        parts = [sum(layers[a:b]) for a, b in zip((0, *cuts), (*cuts, 8))]
        parts[0] += costs.embedding
        parts[-1] += costs.tail
        return parts

    for chunks in (1, 2, 3, 5, 8):
        sizes = balanced_split(costs, chunks)
        cuts = tuple(sum(sizes[: i + 1]) for i in range(chunks - 1))
        best = min((max(work(other)), sum(w * w for w in work(other))) for other in combinations(range(1, 8), chunks - 1))
        assert (max(work(cuts)), sum(w * w for w in work(cuts))) == best


def test_embedding_and_head_are_counted_as_work() -> None:
    # Llama-3.1-405B's own split: 126 layers on 16 stages, one layer fewer on the first and on the last.
    llama = Model(num_layers=126, hidden_size=16384, ffn_hidden_size=53248)
    llama.attention.num_heads, llama.attention.num_query_groups = 128, 8
    sizes = [len(chunk.layers) for chunk in make_chunks(llama, 16, 1, vocab_size=128256)]
    assert sizes == [7] + [8] * 14 + [7]


def test_dense_layers_cost_what_they_multiply() -> None:
    model = model_of(8)
    model.ffn_hidden_size = 640
    costs = costs_of(model, 2000)
    attention = 4 * 64 * 64
    assert costs.layers[0] == attention + 3 * 64 * 640
    assert costs.layers[-1] == attention + 2 * 3 * 64 * 32 + 8 * 64
    assert costs.tail == 64 * 2048 and costs.embedding == costs.tail // 4


def test_a_stated_split_is_taken() -> None:
    chunks = make_chunks(model_of(6, mtp=1), 2, 2, 2000, [0, 3, 2, 1])
    assert [chunk.layers for chunk in chunks] == [(), (0, 1, 2), (3, 4), (5,)]
    assert megatron_pipeline_layout(chunks) == [["embedding"], ["decoder"] * 3, ["decoder"] * 2, ["decoder", "mtp", "loss"]]
