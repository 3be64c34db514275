"""Layer kinds, parameters and pipeline chunks of a model, computed once and cached: a search asks thousands of times.

In: a Model that nobody changes after it is loaded. Out: values cached by the identity of the Model object.

Torch-free.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from configs.model_schema import Model
from parallel import architecture as arch
from parallel.architecture import LayerKind
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
def _layer_kinds(same: _Same) -> tuple[LayerKind, ...]:
    return arch.layer_kinds(same.model)


@lru_cache(maxsize=64)
def _kinds_before(same: _Same) -> dict[LayerKind, tuple[int, ...]]:
    kinds = _layer_kinds(same)
    return {kind: tuple(accumulate((each == kind for each in kinds), initial=0)) for kind in set(kinds)}


@lru_cache(maxsize=64)
def _windows(same: _Same) -> tuple[int | None, ...]:
    return tuple(arch.window_of_layer(same.model, layer) for layer in range(same.model.num_layers))


@lru_cache(maxsize=64)
def _layer(same: _Same, kind: LayerKind) -> LayerParameters:
    return layer_parameters(same.model, kind)


@lru_cache(maxsize=64)
def _costs(same: _Same, vocab: int) -> Costs:
    return costs_of(same.model, vocab)


@lru_cache(maxsize=1024)
def _split(same: _Same, vocab: int, num_chunks: int) -> tuple[int, ...]:
    return tuple(balanced_split(_costs(same, vocab), num_chunks))


@lru_cache(maxsize=1024)
def _chunks(same: _Same, vocab: int, pp: int, vpp: int, split: tuple[int, ...] | None) -> tuple[Chunk, ...]:
    return make_chunks(same.model, pp, vpp, vocab, split or _split(same, vocab, pp * vpp))


def layer_kinds(model: Model) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    return _layer_kinds(_Same(model))


def windows(model: Model) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens; None: full attention."""
    return _windows(_Same(model))


def kinds_among(model: Model, layers: tuple[int, ...]) -> dict[LayerKind, int]:
    """How many of consecutive layers are of each kind of the model."""
    before = _kinds_before(_Same(model))
    return {kind: counts[layers[-1] + 1] - counts[layers[0]] if layers else 0 for kind, counts in before.items()}


def layer_counts(model: Model, kind: LayerKind) -> LayerParameters:
    """Weights of one layer of the given kind."""
    return _layer(_Same(model), kind)


def chunks_of(model: Model, vocab: int, pp: int, vpp: int, split: tuple[int, ...] | None) -> tuple[Chunk, ...]:
    """The chunks of parallel.stages.make_chunks; `split`: layers of each chunk, None for the balanced split."""
    return _chunks(_Same(model), vocab, pp, vpp, split)
