"""Arithmetic of rectangular slices of a tensor: overlaps, indices, and flat ranges of a slice.

A data-parallel rank of a sharded optimizer owns a flat range of a slice. Such a range is a union of a few smaller slices, each
contiguous in the flat order: in every dim a partial row, whole rows, and a partial row.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TensorSlice:
    """The slice [offset[d], offset[d] + shape[d]) of every dim d. The slice of a scalar has no dims and one element."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    def overlap(self, other: TensorSlice) -> TensorSlice | None:
        """The slice that both contain; None: they are disjoint."""
        low = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        high = tuple(min(a + m, b + n) for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True))
        if any(h <= lo for lo, h in zip(low, high, strict=True)):
            return None
        return TensorSlice(low, tuple(h - lo for lo, h in zip(low, high, strict=True)))

    def slices_of(self, outer: TensorSlice) -> tuple[slice, ...]:
        """The index of this slice inside `outer`, one Python slice a dim."""
        starts = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))


def split_range(slice_: TensorSlice, start: int, stop: int) -> Iterator[tuple[int, TensorSlice]]:
    """Split the flat range [start, stop) of `slice_` into rectangular, contiguous parts.

    Yields (flat position in `slice_`, part) in ascending order.
    """
    if start >= stop:
        return
    if start == 0 and stop == slice_.size:
        yield 0, slice_
        return
    inner = prod(slice_.shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        row = TensorSlice((slice_.offset[0] + first, *slice_.offset[1:]), (1, *slice_.shape[1:]))
        rest = TensorSlice(row.offset[1:], row.shape[1:])
        for flat, part in split_range(rest, start - first * inner, stop - first * inner):
            yield first * inner + flat, TensorSlice((row.offset[0], *part.offset), (1, *part.shape))
        return
    whole_first = first if start % inner == 0 else first + 1
    whole_last = last + 1 if stop % inner == 0 else last
    if start < whole_first * inner:
        yield from split_range(slice_, start, whole_first * inner)
    if whole_first < whole_last:
        shape = (whole_last - whole_first, *slice_.shape[1:])
        yield whole_first * inner, TensorSlice((slice_.offset[0] + whole_first, *slice_.offset[1:]), shape)
    if whole_last * inner < stop:
        yield from split_range(slice_, whole_last * inner, stop)
