"""Best-fit decreasing: pieces of text into sequences. In: how many pieces there are of each size. Out: a `Packing`.

The largest piece goes first, each into the sequence with the least room that holds it, or into an empty one ("Fewer Truncations
Improve Language Modeling", arXiv 2404.10830). Pieces of one size are alike, so whole groups of alike sequences are filled at
once: those with room r take floor(r / size) pieces each. A size leaves at most two groups more, and a filled group has less than
half its room left. The cost therefore depends on the number of sizes and not on that of the pieces.

Torch-free.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Groups of alike sequences. Sequences are numbered group by group, and the slots of one size in the order of sequences.

    ends: int64 [groups], the number of the sequence behind each group. fills: int64 [groups], the sizes in a sequence, summed.
    pieces: int64 [groups], the pieces in a sequence. starts: int64 [groups + 1], the first entry of each group. An entry is a
    size that a sequence holds `times` times: sizes, times, firsts: int64 [entries], `firsts` the group's first slot of that size.
    """

    ends: np.ndarray
    fills: np.ndarray
    pieces: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    firsts: np.ndarray

    @property
    def num_sequences(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def group_of(self, sequence: int | np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, sequence, side="right")

    def slots(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """(sizes, numbers among the slots of that size) of a sequence's slots, largest first: int64 [pieces] each."""
        group = int(self.group_of(sequence))
        entries = slice(self.starts[group], self.starts[group + 1])
        times = self.times[entries]
        place = sequence - (self.ends[group - 1] if group else 0)
        within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        return np.repeat(self.sizes[entries], times), np.repeat(self.firsts[entries] + place * times, times) + within

    def sequence_of(self, size: int, slot: int) -> int:
        """The sequence that holds a slot: the inverse of `slots`."""
        entries = np.flatnonzero(self.sizes == size)
        entry = entries[np.searchsorted(self.firsts[entries], slot, side="right") - 1]
        group = int(np.searchsorted(self.starts, entry, side="right")) - 1
        return int((slot - self.firsts[entry]) // self.times[entry] + (self.ends[group - 1] if group else 0))


class _Groups:
    """Groups of alike sequences by the room that they have left. A node (parent, size, times) is what a group took last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nodes: list[tuple[int, int, int]] = []
        self.by_room: dict[int, list[tuple[int, int]]] = {}
        self._rooms: list[int] = []

    def take(self, size: int) -> tuple[int, int, int | None]:
        """(room, last node, sequences) of a group with the least room for `size`; without end where only empty ones have it."""
        place = bisect_left(self._rooms, size)
        if place == len(self._rooms):
            return self.capacity, -1, None
        room = self._rooms[place]
        node, sequences = self.by_room[room].pop()
        if not self.by_room[room]:
            del self.by_room[room], self._rooms[place]
        return room, node, sequences

    def put(self, room: int, node: int, sequences: int) -> None:
        if room not in self.by_room:
            self.by_room[room] = []
            insort(self._rooms, room)
        self.by_room[room].append((node, sequences))

    def fill(self, room: int, node: int, sequences: int, size: int, times: int) -> None:
        """Put `times` pieces of a size into each sequence of a group that was taken."""
        self.nodes.append((node, size, times))
        self.put(room - size * times, len(self.nodes) - 1, sequences)


def pack(counts: np.ndarray, capacity: int) -> Packing:
    """`counts`: int64 [capacity + 1], the pieces of each size; none of size 0. Cost: some capacity x log(capacity) steps."""
    groups = _Groups(capacity)
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            room, node, sequences = groups.take(size)
            each = room // size
            full = left // each if sequences is None else min(left // each, sequences)
            if full:
                groups.fill(room, node, full, size, each)
                left -= full * each
            kept = None if sequences is None else sequences - full
            if left and left < each and kept != 0:
                groups.fill(room, node, 1, size, left)
                left, kept = 0, None if kept is None else kept - 1
            if kept:
                groups.put(room, node, kept)
    return _numbered(groups, capacity)


def _numbered(groups: _Groups, capacity: int) -> Packing:
    counts, fills, pieces, starts, sizes, times = [], [], [], [0], [], []
    for room, found in groups.by_room.items():
        for node, sequences in found:
            path = []
            while node >= 0:
                node, size, each = groups.nodes[node]
                path.append((size, each))
            sizes += [size for size, _ in reversed(path)]
            times += [each for _, each in reversed(path)]
            counts.append(sequences)
            fills.append(capacity - room)
            pieces.append(sum(each for _, each in path))
            starts.append(len(sizes))
    made = (np.array(column, np.int64) for column in (np.cumsum(counts), fills, pieces, starts, sizes, times))
    ends, filled, number, first_entries, of_size, of_times = made
    per_entry = np.repeat(np.array(counts, np.int64), np.diff(first_entries)) * of_times
    return Packing(ends, filled, number, first_entries, of_size, of_times, _sums_before(of_size, per_entry))


def _sums_before(sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """For each entry the sum of the numbers of earlier entries of its size."""
    order = np.argsort(sizes, kind="stable")
    sums = np.cumsum(numbers[order]) - numbers[order]
    begins = np.concatenate([[True], np.diff(sizes[order]) != 0])[: len(order)]
    sums -= np.repeat(sums[begins], np.diff(np.append(np.flatnonzero(begins), len(order))))
    found = np.empty_like(sums)
    found[order] = sums
    return found
