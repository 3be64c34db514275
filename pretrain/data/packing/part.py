"""The samples of one part whose documents are packed by best fit. In: an opened index. Out: a `PartStream`.

Which lengths share a sample follows from the lengths alone, so every epoch has as many samples, and as much padding. Which
document of a length lies in which place, the order within a sample and the order of the samples are shuffled by seed and epoch
(permutation.py). A sample is found without the others, and a document's sample too.

Numbers of an epoch's sequences before they are shuffled: the full pieces of documents that are cut come first, then those of the
`Packing`.

Torch-free.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pretrain.data.indexed import Index, index_sha256
from pretrain.data.order import Span, order_key
from pretrain.data.order_cache import needs_cache
from pretrain.data.packing.best_fit import pack
from pretrain.data.packing.documents import (
    Cut,
    SortedDocuments,
    count_pieces,
    document_lengths,
    load_documents,
    save_documents,
    sort_documents,
)
from pretrain.data.packing.permutation import make_key, permuted, unpermuted
from pretrain.data.samples import PartStream

_COUNTED_AT_ONCE = 1 << 20
# What a key shuffles: the samples of an epoch, the documents of one size, the pieces of a sample.
_SAMPLES, _DOCUMENTS, _PIECES = range(3)


class PackedPart(PartStream):
    """`growth`: tokens by which fill-in-the-middle may lengthen a document; room is kept for them."""

    def __init__(self, index: Index, sequences: range, seq_length_tokens: int, seed: int, cache: Path, growth: int) -> None:
        super().__init__(index, sequences, seq_length_tokens, seed, cache)
        self.cut = Cut(seq_length_tokens + 1, growth)
        self.documents = range(*(bisect_left(index.documents, border) for border in (sequences.start, sequences.stop)))
        self.pieces_in_epoch = count_pieces(index, self.documents, self.cut)
        self.packing = pack(self.pieces_in_epoch.rests, self.cut.capacity)
        self.samples_per_epoch = self.pieces_in_epoch.num_full + self.packing.num_sequences
        self.cached = needs_cache(len(self.documents), self.samples_per_epoch)
        self._first_of_size = np.cumsum(self.pieces_in_epoch.rests) - self.pieces_in_epoch.rests
        # Inputs of a sequence of each group, and of a full piece. The last of s + 1 tokens is a label only.
        self._inputs = np.minimum(self.packing.fills - growth * self.packing.pieces, seq_length_tokens)
        self._full_inputs = min(self.cut.longest, seq_length_tokens)
        groups, full = np.diff(self.packing.ends, prepend=0), self.pieces_in_epoch.num_full
        self.tokens_per_epoch = int((groups * self._inputs).sum()) + full * self._full_inputs
        self._num_padded = int(groups[self._inputs < seq_length_tokens].sum())
        self._num_padded += full if self._full_inputs < seq_length_tokens else 0
        self._sorted: SortedDocuments | None = None

    @property
    def cut_documents(self) -> float:
        """Share of the documents that are cut, because they are longer than a sample."""
        return self.pieces_in_epoch.num_long / max(self.pieces_in_epoch.num_documents, 1)

    def pieces(self, number: int) -> list[np.ndarray]:
        return [self._read(span) for span in self.spans(number)]

    def spans(self, number: int) -> list[Span]:
        """Each span lies in one document, and its `sequence` is the first of the document."""
        epoch, place = divmod(number, self.samples_per_epoch)
        sequence = int(permuted(np.array([place]), self.samples_per_epoch, make_key(self.seed, epoch, _SAMPLES))[0])
        found, num_full = self._documents(), self.pieces_in_epoch.num_full
        if sequence < num_full:
            which = int(np.searchsorted(found.long_ends, sequence, side="right"))
            piece = sequence - (int(found.long_ends[which - 1]) if which else 0)
            return [self._span(int(found.long[which]), piece * (self.cut.longest - 1), self.cut.longest)]
        rests, (sizes, slots) = self.pieces_in_epoch.rests, self.packing.slots(sequence - num_full)
        # One call for both shuffles: a call costs 0.2 ms for any small number of items.
        items, ranges = np.append(slots, np.arange(len(sizes))), np.append(rests[sizes], np.full(len(sizes), len(sizes)))
        own = np.repeat(make_key(self.seed, epoch, _PIECES, sequence), len(sizes))
        keys = np.append(make_key(self.seed, epoch, _DOCUMENTS, sizes), own)
        places, order = np.split(permuted(items, ranges, keys), 2)
        documents = found.rests[self._first_of_size[sizes] + places].astype(np.int64)
        spans = []
        for piece in order.tolist():
            document, tokens = int(documents[piece]), int(sizes[piece]) - self.cut.growth
            spans.append(self._span(document, self._length(document) - tokens, tokens))
        return spans

    def numbers_of(self, sequence: int, epoch: int) -> list[int]:
        """None for a sequence that is not the first of its document: `spans` name the first."""
        document = self.index.document_of(sequence)
        length = self._length(document)
        if int(self.index.documents[document]) != sequence or not length:
            return []
        found, rests = self._documents(), self.pieces_in_epoch.rests
        sequences = list(self._full_pieces(document, found))
        size = int(self.cut.rest(np.array(length))) + self.cut.growth
        first = int(self._first_of_size[size])
        place = bisect_left(found.rests[first : first + int(rests[size])], document)
        slot = unpermuted(np.array([place]), int(rests[size]), make_key(self.seed, epoch, _DOCUMENTS, size))
        sequences.append(self.pieces_in_epoch.num_full + self.packing.sequence_of(size, int(slot[0])))
        places = unpermuted(np.array(sequences), self.samples_per_epoch, make_key(self.seed, epoch, _SAMPLES))
        return [epoch * self.samples_per_epoch + place for place in places.tolist()]

    def tokens_between(self, first: int, stop: int) -> int:
        """Exact. Costs 1 µs for each sample of a begun epoch, or for each sample with padding where those are fewer."""
        before, after = (divmod(number, self.samples_per_epoch) for number in (first, stop))
        if before[0] == after[0]:
            return self._tokens_in(before[0], before[1], after[1])
        between = (after[0] - before[0] - 1) * self.tokens_per_epoch
        return self._tokens_in(before[0], before[1], self.samples_per_epoch) + between + self._tokens_in(after[0], 0, after[1])

    def build_cache(self, num_samples: int, say: Callable[[str], None]) -> None:
        if self.cached and num_samples and load_documents(self.cache, self._key(), self.documents, self.pieces_in_epoch) is None:
            save_documents(self.cache, self._key(), self.index, self.documents, self.cut, self.pieces_in_epoch, say)

    def _documents(self) -> SortedDocuments:
        """The sorted documents. Each rank sorts them in memory when no file was built ahead."""
        if self._sorted is None:
            kept = load_documents(self.cache, self._key(), self.documents, self.pieces_in_epoch) if self.cached else None
            self._sorted = kept or sort_documents(self.index, self.documents, self.cut, self.pieces_in_epoch)
        return self._sorted

    def _key(self) -> str:
        span = [self.documents.start, self.documents.stop]
        return order_key(idx=index_sha256(self.index.prefix), documents=span, longest=self.cut.longest, growth=self.cut.growth)

    def _length(self, document: int) -> int:
        return int(document_lengths(self.index, range(document, document + 1))[0])

    def _span(self, document: int, offset: int, tokens: int) -> Span:
        return Span(int(self.index.documents[document]), offset, tokens)

    def _full_pieces(self, document: int, found: SortedDocuments) -> range:
        which = bisect_left(found.long, document)
        if which == len(found.long) or found.long[which] != document:
            return range(0)
        return range(int(found.long_ends[which - 1]) if which else 0, int(found.long_ends[which]))

    def _tokens_in(self, epoch: int, first: int, stop: int) -> int:
        """Tokens of the samples at these places of an epoch."""
        tokens, key = 0, make_key(self.seed, epoch, _SAMPLES)
        if stop - first <= self._num_padded:
            for places in _chunks(first, stop):
                tokens += int(self._inputs_of(permuted(places, self.samples_per_epoch, key)).sum())
            return tokens
        tokens = (stop - first) * self.seq_length_tokens
        for sequences in self._padded():
            places = unpermuted(sequences, self.samples_per_epoch, key)
            room = self.seq_length_tokens - self._inputs_of(sequences)
            tokens -= int(room[(places >= first) & (places < stop)].sum())
        return tokens

    def _inputs_of(self, sequences: np.ndarray) -> np.ndarray:
        num_full = self.pieces_in_epoch.num_full
        found = np.full(len(sequences), self._full_inputs, np.int64)
        packed = sequences >= num_full
        found[packed] = self._inputs[self.packing.group_of(sequences[packed] - num_full)]
        return found

    def _padded(self) -> Iterator[np.ndarray]:
        """The sequences with padding, in chunks."""
        num_full, begin = self.pieces_in_epoch.num_full, 0
        if self._full_inputs < self.seq_length_tokens:
            yield from _chunks(0, num_full)
        for end, inputs in zip(self.packing.ends.tolist(), self._inputs.tolist(), strict=True):
            if inputs < self.seq_length_tokens:
                yield from _chunks(num_full + begin, num_full + end)
            begin = end


def _chunks(first: int, stop: int) -> Iterator[np.ndarray]:
    return (np.arange(at, min(at + _COUNTED_AT_ONCE, stop)) for at in range(first, stop, _COUNTED_AT_ONCE))
