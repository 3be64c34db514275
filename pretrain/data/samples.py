"""The tokens and masks of a sample. In: opened parts with their weights. Out: a `SampleStream`, endless, with random access.

The tokens of sample number i depend on the data, the seed, the sequence length and the blend. They don't depend on the layout,
the batch sizes or the number of steps. Let a part have n samples an epoch. Its sample i is then sample i mod n of epoch i div n.
Each epoch holds every sample once, in an order of its own (seed + epoch).

Shapes: s = batch.seq_length_tokens.

Torch-free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pretrain.data.blend import Blend
from pretrain.data.fim import FillInTheMiddle
from pretrain.data.indexed import Index, index_sha256, samples_in
from pretrain.data.order import EpochOrder, Span, build_order, load_order, order_key, save_order
from pretrain.data.order_cache import needs_cache

OPEN_EPOCHS = 2


@dataclass(frozen=True)
class Sample:
    """tokens: int64 [s + 1], of which the first s are inputs and the last s labels. loss_mask: float32 [s].

    document_ids: int32 [s], or None without document masks.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    document_ids: np.ndarray | None


class PartStream(ABC):
    """The samples of one part in one split, over an endless row of epochs.

    `samples_per_epoch`: 0 where the part has no sample. `tokens_per_epoch`: inputs of an epoch without padding.
    """

    samples_per_epoch: int
    tokens_per_epoch: int

    def __init__(self, index: Index, sequences: range, seq_length_tokens: int, seed: int, cache: Path) -> None:
        self.index, self.sequences, self.seq_length_tokens = index, sequences, seq_length_tokens
        self.seed, self.cache = seed, cache
        self._tokens = index.tokens()

    @abstractmethod
    def pieces(self, number: int) -> list[np.ndarray]:
        """The part's sample `number`, counted over all epochs, as rows of tokens: int64, s + 1 tokens at most in all."""

    @abstractmethod
    def spans(self, number: int) -> list[Span]:
        """Where the tokens of the part's sample `number` lie in its file, in order."""

    @abstractmethod
    def numbers_of(self, sequence: int, epoch: int) -> list[int]:
        """The part's samples of one epoch that hold tokens of a sequence, in the order of their tokens."""

    @abstractmethod
    def tokens_between(self, first: int, stop: int) -> int:
        """Inputs of the part's samples `first` to below `stop`, without padding."""

    @abstractmethod
    def build_cache(self, num_samples: int, say: Callable[[str], None]) -> None:
        """Write the missing files that the first `num_samples` samples need, and tell `say` how far it is. Raises OSError."""

    def _read(self, span: Span) -> np.ndarray:
        first = self.index.tokens_before(span.sequence) + span.offset
        return self._tokens[first : first + span.length].astype(np.int64)


class ConcatenatedPart(PartStream):
    """Documents laid end to end and cut every s tokens. A sample is one row."""

    def __init__(self, index: Index, sequences: range, seq_length_tokens: int, seed: int, cache: Path) -> None:
        super().__init__(index, sequences, seq_length_tokens, seed, cache)
        self.samples_per_epoch = samples_in(index, sequences, seq_length_tokens)
        self.tokens_per_epoch = self.samples_per_epoch * seq_length_tokens
        self.cached = needs_cache(len(sequences), self.samples_per_epoch)
        self._orders: dict[int, EpochOrder] = {}

    def pieces(self, number: int) -> list[np.ndarray]:
        return [np.concatenate([self._read(span) for span in self.spans(number)])]

    def spans(self, number: int) -> list[Span]:
        epoch, place = divmod(number, self.samples_per_epoch)
        return self._order(epoch).spans(place, self.index.lengths)

    def numbers_of(self, sequence: int, epoch: int) -> list[int]:
        return [epoch * self.samples_per_epoch + place for place in self._order(epoch).places_of(sequence)]

    def tokens_between(self, first: int, stop: int) -> int:
        return (stop - first) * self.seq_length_tokens

    def build_cache(self, num_samples: int, say: Callable[[str], None]) -> None:
        for epoch in range(-(-num_samples // self.samples_per_epoch) if self.cached else 0):
            if load_order(self.cache, self._key(epoch), self.samples_per_epoch) is None:
                say(f"shuffling {self.index.prefix}, epoch {epoch}")
                save_order(self.cache, self._key(epoch), self._build(epoch))

    def _order(self, epoch: int) -> EpochOrder:
        """The epoch's order. Each rank makes it in memory when no file was built ahead."""
        if epoch not in self._orders:
            order = load_order(self.cache, self._key(epoch), self.samples_per_epoch) if self.cached else None
            kept = list(self._orders.items())[1 - OPEN_EPOCHS :]
            self._orders = dict([*kept, (epoch, order or self._build(epoch))])
        return self._orders[epoch]

    def _build(self, epoch: int) -> EpochOrder:
        return build_order(self.index.lengths, self.sequences, self.seq_length_tokens, self.seed + epoch)

    def _key(self, epoch: int) -> str:
        span = [self.sequences.start, self.sequences.stop]
        seed = self.seed + epoch
        return order_key(idx=index_sha256(self.index.prefix), span=span, seq=self.seq_length_tokens, seed=seed)


@dataclass(frozen=True)
class SampleMasks:
    """Makes a sample by the config's rules. `eod_id`: the id of the end-of-document token. `fim`: None where it is off."""

    eod_id: int
    document_mask: bool
    mask_eod_loss: bool
    fim: FillInTheMiddle | None = None

    def sample(self, pieces: list[np.ndarray], sample_index: int, seq_length_tokens: int) -> Sample:
        """The sample of these rows of tokens, int64, with masks by Megatron's conventions.

        An end-of-document token belongs to the document that it ends. `mask_eod_loss` drops the loss at inputs that are such a
        token, because their label is the first token of the next document. Where there are several rows, each ends a document.
        Rows of less than s + 1 tokens are padded with end-of-document tokens, which are a document and have no loss.
        """
        if self.fim is not None:
            random = self.fim.random_of(sample_index)
            pieces = [self.fim.transform(piece, random) for piece in pieces]
        tokens = np.concatenate(pieces)[: seq_length_tokens + 1]
        filled = len(tokens)
        ends = tokens == self.eod_id
        if len(pieces) > 1 or filled <= seq_length_tokens:
            ends[np.minimum(np.cumsum([len(piece) for piece in pieces]), filled) - 1] = True
        tokens, ends = (np.pad(row, (0, seq_length_tokens + 1 - filled)) for row in (tokens, ends))
        tokens[filled:] = self.eod_id
        ends, loss_mask = ends[:-1], np.ones(seq_length_tokens, np.float32)
        if self.mask_eod_loss:
            loss_mask[ends] = 0.0
        # The label of the last token would be padding.
        loss_mask[filled - 1 :] = 0.0
        document_ids = None
        if self.document_mask:
            document_ids = np.cumsum(ends, dtype=np.int32) - ends
        return Sample(tokens, loss_mask, document_ids)


@dataclass(frozen=True)
class Mix:
    """From sample `first_sample` on, the parts have these shares. `weights`: one a part of the stream; 0: not in the mix."""

    first_sample: int
    weights: tuple[float, ...]


class _OpenMix:
    """A mix with its pattern. `before`: how many samples each part has given when the mix begins."""

    def __init__(self, mix: Mix, before: list[int]) -> None:
        self.first_sample, self.before = mix.first_sample, before
        self._parts = [part for part, weight in enumerate(mix.weights) if weight]
        self._blend = Blend([mix.weights[part] for part in self._parts]) if len(self._parts) > 1 else None

    def locate(self, sample: int) -> tuple[int, int]:
        place, number = self._blend.locate(sample - self.first_sample) if self._blend else (0, sample - self.first_sample)
        part = self._parts[place]
        return part, self.before[part] + number

    def find(self, part: int, number: int) -> int:
        number -= self.before[part]
        return self.first_sample + (self._blend.find(self._parts.index(part), number) if self._blend else number)

    def counts_before(self, sample: int) -> list[int]:
        counts, given = list(self.before), sample - self.first_sample
        for part, count in zip(self._parts, self._blend.counts_before(given).tolist() if self._blend else [given], strict=True):
            counts[part] += count
        return counts


class SampleStream:
    """A blend of parts as one endless row of samples. `len`: the samples of one epoch, summed over the parts.

    `mixes`: the first begins at sample 0, the others later and later. A part goes on where the mix before has left it.
    """

    def __init__(self, parts: list[PartStream], mixes: list[Mix], masks: SampleMasks) -> None:
        self.parts, self.masks = parts, masks
        self._mixes: list[_OpenMix] = []
        for mix in mixes:
            self._mixes.append(_OpenMix(mix, self.counts_before(mix.first_sample) if self._mixes else [0] * len(parts)))

    def __len__(self) -> int:
        return sum(part.samples_per_epoch for part in self.parts)

    def _mix_at(self, sample_index: int) -> _OpenMix:
        return next(mix for mix in reversed(self._mixes) if mix.first_sample <= sample_index)

    def locate(self, sample_index: int) -> tuple[int, int]:
        """(index of the part, number of the sample in that part)."""
        return self._mix_at(sample_index).locate(sample_index)

    def find(self, part: int, number: int) -> int:
        """The sample that is the part's sample `number`: the inverse of `locate`."""
        # A mix without the part doesn't move its count, so the mix before it is the one that gives the sample.
        for mix, after in pairwise(self._mixes):
            if number < after.before[part]:
                return mix.find(part, number)
        return self._mixes[-1].find(part, number)

    def counts_before(self, sample_index: int) -> list[int]:
        """How many samples each part has given before this one."""
        return self._mix_at(sample_index).counts_before(sample_index)

    def __getitem__(self, sample_index: int) -> Sample:
        part, number = self.locate(sample_index)
        return self.masks.sample(self.parts[part].pieces(number), sample_index, self.parts[part].seq_length_tokens)

    def tokens_of(self, samples: range) -> int:
        """Inputs of these samples, without padding."""
        before, after = self.counts_before(samples.start), self.counts_before(samples.stop)
        return sum(part.tokens_between(low, high) for part, low, high in zip(self.parts, before, after, strict=True))

    def build_cache(self, num_samples: int, say: Callable[[str], None]) -> None:
        """Write the order files for the first `num_samples` samples and 1% more. `say` is told how far it is. Raises OSError."""
        for part, count in zip(self.parts, self.counts_before(int(num_samples * 1.01) + 1), strict=True):
            part.build_cache(count, say)
