"""Laws of slices: a flat range splits into contiguous slices that cover it once, in order."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.model.init import normal
from pretrain.model.tensor_slice import TensorSlice, split_range

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.data())
@settings(deadline=None)
def test_split_range_covers_the_range_once_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    offset = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    slice_ = TensorSlice(offset, shape)
    start = data.draw(st.integers(0, slice_.size))
    stop = data.draw(st.integers(start, slice_.size))
    numbers = np.arange(slice_.size).reshape(shape)
    seen: list[int] = []
    for position, part in split_range(slice_, start, stop):
        inside = numbers[part.slices_of(slice_)].flatten().tolist()
        assert inside == list(range(position, position + part.size)), "contiguous in the flat order"
        seen += inside
    assert seen == list(range(start, stop))


@given(SHAPES, st.data())
@settings(deadline=None)
def test_overlap_is_what_both_hold(shape: tuple[int, ...], data: st.DataObject) -> None:
    def slice_() -> TensorSlice:
        offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        return TensorSlice(offset, tuple(data.draw(st.integers(1, size - low)) for size, low in zip(shape, offset, strict=True)))

    one, other = slice_(), slice_()
    whole = TensorSlice((0,) * len(shape), shape)
    marks = np.zeros(shape, dtype=int)
    marks[one.slices_of(whole)] += 1
    marks[other.slices_of(whole)] += 1
    common = one.overlap(other)
    assert (marks == 2).sum() == (common.size if common else 0)
    if common:
        assert (marks[common.slices_of(whole)] == 2).all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), st.data())
@settings(deadline=None)
def test_initial_values_depend_on_the_position_alone(shape: tuple[int, ...], data: st.DataObject) -> None:
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    part = TensorSlice(offset, tuple(data.draw(st.integers(1, size - low)) for size, low in zip(shape, offset, strict=True)))
    whole = TensorSlice((0,) * len(shape), shape)
    full = normal("decoder.weight", shape, whole, seed=3)
    assert torch.equal(normal("decoder.weight", shape, part, seed=3), full[part.slices_of(whole)])


def test_initial_values_are_standard_normal_and_differ_by_name_and_seed() -> None:
    slice_ = TensorSlice((0, 0), (512, 512))
    values = normal("a", slice_.shape, slice_, 1)
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.std()) - 1) < 0.01
    assert float(values.abs().max()) < 5.6
    for other in (normal("b", slice_.shape, slice_, 1), normal("a", slice_.shape, slice_, 2)):
        assert abs(float((values * other).mean())) < 0.01
