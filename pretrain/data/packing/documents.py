"""The documents of a part by the size of what is packed of them. In: an index and a rule of cutting. Out: `SortedDocuments`.

A document that fits into a sample is one piece. A longer one is cut into pieces that fill a sample each, and a rest, which is
packed. Neighbouring pieces share one token, as neighbouring samples of concatenated documents do: the last label of one is the
first input of the next, so each token of a document but its first is a label once.

The index is read in chunks, and large ones are sorted in files that the ranks share: 4 bytes a document, 12 more for each that is
cut. Memory does not grow with the number of documents.

Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.indexed import Index
from pretrain.data.order_cache import load_arrays, written_whole

CHUNK = 1 << 20
_TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class Cut:
    """How documents become pieces. `capacity`: tokens of a sample, s + 1. `growth`: tokens by which a piece may grow."""

    capacity: int
    growth: int

    @property
    def longest(self) -> int:
        """Tokens of the longest piece."""
        return self.capacity - self.growth

    def num_full(self, lengths: np.ndarray) -> np.ndarray:
        """How many full pieces a document has before its rest."""
        return np.maximum(-((self.longest - lengths) // (self.longest - 1)), 0)

    def rest(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of a document's last piece, which is packed: 1 to `longest`."""
        return lengths - self.num_full(lengths) * (self.longest - 1)


@dataclass(frozen=True)
class Pieces:
    """How many pieces a part has. `rests`: int64 [capacity + 1], the rests by size, growth included."""

    rests: np.ndarray
    num_full: int
    num_long: int

    @property
    def num_documents(self) -> int:
        """Documents that are not empty."""
        return int(self.rests.sum())


@dataclass(frozen=True)
class SortedDocuments:
    """rests: uint32 or int64 [documents], the documents by the size of their rest, and by number within a size.

    long: the documents that are cut, ascending. long_ends: int64, their full pieces, summed up to and with each.
    """

    rests: np.ndarray
    long: np.ndarray
    long_ends: np.ndarray


def document_lengths(index: Index, documents: range) -> np.ndarray:
    """Tokens of each document: int64 [documents]."""
    marks = index.documents[documents.start : documents.stop + 1]
    begins = index.pointers[np.minimum(marks, index.num_sequences - 1)] // index.dtype.itemsize
    return np.diff(np.where(marks == index.num_sequences, index.num_tokens, begins))


def count_pieces(index: Index, documents: range, cut: Cut) -> Pieces:
    """One pass over the lengths, of some 16 bytes a document."""
    rests, full, long = np.zeros(cut.capacity + 1, np.int64), 0, 0
    for chunk in _chunks(documents):
        lengths = document_lengths(index, chunk)
        lengths = lengths[lengths > 0]
        rests += np.bincount(cut.rest(lengths) + cut.growth, minlength=cut.capacity + 1)
        each = cut.num_full(lengths)
        full, long = full + int(each.sum()), long + int(np.count_nonzero(each))
    return Pieces(rests, full, long)


def sort_documents(index: Index, documents: range, cut: Cut, pieces: Pieces) -> SortedDocuments:
    """The sorted documents in memory."""
    made = {name: np.empty(shape, kind) for name, (shape, kind) in _shapes(documents, pieces).items()}
    _fill(made, index, documents, cut, pieces, lambda text: None)
    return SortedDocuments(**made)


def save_documents(
    folder: Path, key: str, index: Index, documents: range, cut: Cut, pieces: Pieces, say: Callable[[str], None]
) -> None:
    """The sorted documents in files, which appear whole when all are written. `say` is told of the progress. Raises OSError."""
    with written_whole(folder, key, _shapes(documents, pieces)) as arrays:
        _fill(arrays, index, documents, cut, pieces, say)


def load_documents(folder: Path, key: str, documents: range, pieces: Pieces) -> SortedDocuments | None:
    """Files of `save_documents`, memory-mapped. None: they don't exist, or are damaged, which is logged as a warning."""
    found = load_arrays(folder, key, {name: shape for name, (shape, _) in _shapes(documents, pieces).items()})
    return SortedDocuments(**found) if found else None


def _shapes(documents: range, pieces: Pieces) -> dict[str, tuple[tuple[int], type]]:
    number = np.uint32 if documents.stop < 1 << 32 else np.int64
    long = (pieces.num_long,)
    return {"rests": ((pieces.num_documents,), number), "long": (long, number), "long_ends": (long, np.int64)}


def _fill(
    arrays: dict[str, np.ndarray], index: Index, documents: range, cut: Cut, pieces: Pieces, say: Callable[[str], None]
) -> None:
    """A counting sort: a chunk's documents are sorted by size, and each size goes on where the chunk before has left it."""
    free, long, full = np.cumsum(pieces.rests) - pieces.rests, 0, 0
    small = np.uint16 if cut.capacity < 1 << 16 else np.int32
    told_s = time.monotonic()
    for chunk in _chunks(documents):
        lengths = document_lengths(index, chunk)
        numbers = np.flatnonzero(lengths)
        lengths, numbers = lengths[numbers], numbers + chunk.start
        sizes = (cut.rest(lengths) + cut.growth).astype(small)
        order = np.argsort(sizes, kind="stable")
        counts = np.bincount(sizes, minlength=cut.capacity + 1)
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        arrays["rests"][np.repeat(free, counts) + within] = numbers[order]
        free += counts
        each = cut.num_full(lengths)
        cut_here = np.flatnonzero(each)
        target = slice(long, long + len(cut_here))
        arrays["long"][target] = numbers[cut_here]
        arrays["long_ends"][target] = full + np.cumsum(each[cut_here])
        long, full = target.stop, full + int(each.sum())
        if time.monotonic() - told_s > _TELL_EVERY_S:
            told_s = time.monotonic()
            done = chunk.stop - documents.start
            say(f"packing {index.prefix}: {done:,} of {len(documents):,} documents are sorted by length")


def _chunks(documents: range) -> Iterator[range]:
    return (documents[first : first + CHUNK] for first in range(0, len(documents), CHUNK))
