"""Laws of slices: a flat range splits into contiguous boxes that cover it once, in order."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.model.init import normal
from pretrain.model.tensor_slice import TensorSlice, split_range

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_split_range_covers_the_range_once_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    offset = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    box = TensorSlice(offset, shape)
    start = data.draw(st.integers(0, box.size))
    stop = data.draw(st.integers(start, box.size))
    numbers = np.arange(box.size).reshape(shape)
    seen: list[int] = []
    for position, part in split_range(box, start, stop):
        inside = numbers[part.slices_of(box)].flatten().tolist()
        assert inside == list(range(position, position + part.size)), "contiguous in the flat order"
        seen += inside
    assert seen == list(range(start, stop))


@given(SHAPES, st.data())
def test_overlap_is_what_both_hold(shape: tuple[int, ...], data: st.DataObject) -> None:
    def box() -> TensorSlice:
        offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        return TensorSlice(offset, tuple(data.draw(st.integers(1, size - low)) for size, low in zip(shape, offset, strict=True)))

    one, other = box(), box()
    whole = TensorSlice((0,) * len(shape), shape)
    marks = np.zeros(shape, dtype=int)
    marks[one.slices_of(whole)] += 1
    marks[other.slices_of(whole)] += 1
    common = one.overlap(other)
    assert (marks == 2).sum() == (common.size if common else 0)
    if common:
        assert (marks[common.slices_of(whole)] == 2).all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), st.data())
def test_initial_values_depend_on_the_position_alone(shape: tuple[int, ...], data: st.DataObject) -> None:
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    part = TensorSlice(offset, tuple(data.draw(st.integers(1, size - low)) for size, low in zip(shape, offset, strict=True)))
    whole = TensorSlice((0,) * len(shape), shape)
    full = normal("decoder.weight", shape, whole, seed=3)
    assert torch.equal(normal("decoder.weight", shape, part, seed=3), full[part.slices_of(whole)])


def test_initial_values_are_standard_normal_and_differ_by_name_and_seed() -> None:
    box = TensorSlice((0, 0), (512, 512))
    values = normal("a", box.shape, box, 1)
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.std()) - 1) < 0.01
    assert float(values.abs().max()) < 5.6
    for other in (normal("b", box.shape, box, 1), normal("a", box.shape, box, 2)):
        assert abs(float((values * other).mean())) < 0.01
