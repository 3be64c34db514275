"""Layer kinds, parameters and pipeline chunks of a model, computed once and cached: a search asks thousands of times.

In: a Model that nobody changes after it is loaded. Out: values cached by the identity of the Model object.

Torch-free.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from configs.model_schema import Model
from parallel import architecture as arch
from parallel.flops import LayerParameters, layer_parameters
from parallel.stages import Chunk, Costs, balanced_split, costs_of, make_chunks


class _Same:
    """A model as a cache key, equal only to itself. The cache keeps the model alive, so that no other object gets its id."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __hash__(self) -> int:
        return id(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.model is self.model


@lru_cache(maxsize=64)
def _moe_layers(same: _Same) -> tuple[bool, ...]:
    return arch.moe_layers(same.model)


@lru_cache(maxsize=64)
def _moe_before(same: _Same) -> tuple[int, ...]:
    return tuple(accumulate(_moe_layers(same), initial=0))


@lru_cache(maxsize=64)
def _windows(same: _Same) -> tuple[int | None, ...]:
    return tuple(arch.window_of_layer(same.model, layer) for layer in range(same.model.num_layers))


@lru_cache(maxsize=64)
def _layer(same: _Same, is_moe: bool) -> LayerParameters:
    return layer_parameters(same.model, is_moe)


@lru_cache(maxsize=64)
def _costs(same: _Same, vocab: int) -> Costs:
    return costs_of(same.model, vocab)


@lru_cache(maxsize=1024)
def _split(same: _Same, vocab: int, num_chunks: int) -> tuple[int, ...]:
    return tuple(balanced_split(_costs(same, vocab), num_chunks))


@lru_cache(maxsize=1024)
def _chunks(same: _Same, vocab: int, pp: int, vpp: int, split: tuple[int, ...] | None) -> tuple[Chunk, ...]:
    return make_chunks(same.model, pp, vpp, vocab, split or _split(same, vocab, pp * vpp))


def moe_layers(model: Model) -> tuple[bool, ...]:
    """For each layer, whether it is a MoE layer."""
    return _moe_layers(_Same(model))


def windows(model: Model) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens; None: full attention."""
    return _windows(_Same(model))


def moe_among(model: Model, layers: tuple[int, ...]) -> int:
    """How many of consecutive layers are MoE layers."""
    before = _moe_before(_Same(model))
    return before[layers[-1] + 1] - before[layers[0]] if layers else 0


def layer_counts(model: Model, is_moe: bool) -> LayerParameters:
    """Weights of one layer of the given kind."""
    return _layer(_Same(model), is_moe)


def chunks_of(model: Model, vocab: int, pp: int, vpp: int, split: tuple[int, ...] | None) -> tuple[Chunk, ...]:
    """The chunks of parallel.stages.make_chunks; `split`: layers of each chunk, None for the balanced split."""
    return _chunks(_Same(model), vocab, pp, vpp, split)
