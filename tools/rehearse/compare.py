"""Comparison of two trainings of the same model, tensor by tensor.

In: the results of their ranks. Out: the largest differences, and the first tensor that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.model.tensor_slice import TensorSlice
from tools.rehearse.train_rank import RankResult, SliceKey

Tensors = dict[str, NDArray[np.float32]]

# For fp32. Relative difference of losses and norms; for tensors |difference| / |reference| in 2-norms.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4, 1e-4
# Smallest reference norm, as a fraction of the norm of all tensors together: rounding dominates smaller tensors.
FLOOR = 1e-4


@dataclass(frozen=True)
class Comparison:
    """The largest relative differences, and the first quantity that exceeds its tolerance."""

    loss_max_rel: float
    grad_norm_max_rel: float
    grad_max_rel: float
    weight_max_rel: float
    first_difference: str | None
    first_difference_rel: float | None
    bit_equal: bool

    @property
    def ok(self) -> bool:
        return self.first_difference is None

    def as_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "ok": self.ok}


def assemble(slices: Sequence[dict[SliceKey, NDArray[np.float32]]]) -> Tensors:
    """The whole tensors by name. Raises ValueError when an element is on no rank or on two."""
    whole: Tensors = {}
    count: Tensors = {}
    for part in slices:
        for (name, shape, slice_, first, stop), values in part.items():
            index = slice_.slices_of(TensorSlice((0,) * len(shape), shape))
            for target, content in ((whole, values), (count, np.ones_like(values))):
                tensor = target.setdefault(name, np.zeros(shape, dtype=np.float32))
                flat = tensor[index].flatten()
                flat[first:stop] += content
                tensor[index] = flat.reshape(slice_.shape)
    wrong = [name for name, times in count.items() if not (times == 1).all()]
    if wrong:
        raise ValueError(f"elements of {wrong[0]} are on no rank, or written by two")
    return whole


def compare(ranks: Sequence[RankResult], references: Sequence[RankResult]) -> Comparison:
    """The differences between the ranks of a layout and those of another training of the same model."""
    got, want = ranks[0], references[0]
    loss = _largest([*got.losses, *got.source_losses], [*want.losses, *want.source_losses])
    norm = _largest(got.grad_norms, want.grad_norms)
    initial, gradients, weights = (
        _tensors([getattr(rank, kind) for rank in ranks], [getattr(rank, kind) for rank in references], tolerance)
        for kind, tolerance in (("initial", 0.0), ("gradients", GRADIENT_TOLERANCE), ("weights", WEIGHT_TOLERANCE))
    )
    first = initial.first and (f"{initial.first[0]} before the first step", initial.first[1])
    first = first or gradients.first or weights.first
    if first is None and max(loss, norm) > LOSS_TOLERANCE:
        first = ("loss", loss) if loss > LOSS_TOLERANCE else ("gradient norm", norm)
    if first is None and any(rank.losses != got.losses for rank in ranks):
        first = ("loss, which differs between ranks", max(_largest(rank.losses, got.losses) for rank in ranks))
    name, size = first or (None, None)
    equal = gradients.bit_equal and weights.bit_equal and got.losses == want.losses
    return Comparison(loss, norm, gradients.largest, weights.largest, name, size, equal)


def _largest(got: Sequence[float], want: Sequence[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(got, want, strict=True))


@dataclass(frozen=True)
class _TensorDifferences:
    """`first`: the first tensor in model order above the tolerance, and its relative difference."""

    largest: float
    first: tuple[str, float] | None
    bit_equal: bool


def _tensors(
    slices: Sequence[dict[SliceKey, NDArray[np.float32]]],
    reference: Sequence[dict[SliceKey, NDArray[np.float32]]],
    tolerance: float,
) -> _TensorDifferences:
    got, want = assemble(slices), assemble(reference)
    if got.keys() != want.keys():
        return _TensorDifferences(float("inf"), (f"{sorted(got.keys() ^ want.keys())[0]} (missing)", float("inf")), False)
    floor = FLOOR * float(np.sqrt(sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in want.values())))
    relative = {
        name: float(np.linalg.norm(got[name] - want[name]) / max(float(np.linalg.norm(want[name])), floor)) for name in want
    }
    first = next(((name, value) for name, value in relative.items() if not value <= tolerance), None)
    return _TensorDifferences(max(relative.values()), first, all(np.array_equal(got[name], want[name]) for name in want))
