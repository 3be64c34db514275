"""Token files to batches, read without any code of the package: what a run must train on, from the format and the rules alone.

In: a config and the id of the end-of-document token. Out: samples by number, training and held-out. Sources: Megatron-Core's
indexed_dataset (the layout of PREFIX.idx), gpt_dataset (documents shuffled and laid end to end, neighbouring samples share one
token, samples shuffled, all from one RandomState) and blended_dataset (the part that lags its share most comes next).

Shapes: s tokens of a sequence.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

# Codes of element types in the header of PREFIX.idx.
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


@dataclass(frozen=True)
class Sample:
    """tokens int64 [s + 1]; weights float32 [s]: 1 where the label counts; documents int64 [s]: which document an input is of."""

    tokens: np.ndarray
    weights: np.ndarray
    documents: np.ndarray


def read_pair(prefix: str) -> tuple[list[np.ndarray], np.ndarray]:
    """(tokens of each sequence, first sequence of each document and the end) of PREFIX.bin and PREFIX.idx."""
    with open(f"{prefix}.idx", "rb") as file:
        assert file.read(9) == b"MMIDIDX\x00\x00"
        version, code, num_sequences, num_documents = struct.unpack("<QBQQ", file.read(25))
        assert version == 1
        lengths = np.fromfile(file, "<i4", num_sequences)
        offsets = np.fromfile(file, "<i8", num_sequences)
        documents = np.fromfile(file, "<i8", num_documents)
    raw = np.fromfile(f"{prefix}.bin", DTYPES[code])
    starts = offsets // raw.itemsize
    return [raw[start : start + length] for start, length in zip(starts, lengths, strict=True)], documents


class Part:
    """One part's samples, epoch after epoch, each in an order of its own."""

    def __init__(self, sequences: list[np.ndarray], seq_length: int, seed: int) -> None:
        self.sequences, self.seq_length, self.seed = sequences, seq_length, seed
        self.samples_per_epoch = (sum(map(len, sequences)) - 1) // seq_length
        self.epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def tokens(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.samples_per_epoch)
        if epoch not in self.epochs:
            random = np.random.RandomState(self.seed + epoch)
            order = np.arange(len(self.sequences), dtype=np.int32)
            random.shuffle(order)
            shuffle = np.arange(self.samples_per_epoch, dtype=np.uint32)
            random.shuffle(shuffle)
            self.epochs[epoch] = np.concatenate([self.sequences[i] for i in order]).astype(np.int64), shuffle
        stream, shuffle = self.epochs[epoch]
        first = int(shuffle[place]) * self.seq_length
        return stream[first : first + self.seq_length + 1]


class Stream:
    """Samples of a blend by their number."""

    def __init__(self, parts: list[Part], shares: list[float], config: Any, eod: int) -> None:
        self.parts, self.config, self.eod = parts, config, eod
        self.shares = np.array(shares) / sum(shares)
        self.counts = np.zeros(len(parts), np.int64)
        self.plan: list[tuple[int, int]] = []

    def __getitem__(self, number: int) -> Sample:
        while len(self.plan) <= number:
            lag = self.shares * max(len(self.plan), 1) - self.counts
            part = int(lag.argmax())
            self.plan.append((part, int(self.counts[part])))
            self.counts[part] += 1
        part, place = self.plan[number]
        tokens = self.parts[part].tokens(place)
        ends = tokens[:-1] == self.eod
        weights = np.ones(len(ends), np.float32)
        if self.config.data.mask_eod_loss:
            weights[ends] = 0
        # The token that ends a document belongs to it.
        return Sample(tokens, weights, np.cumsum(ends) - ends)


def open_data(config: Any, eod: int) -> tuple[Stream, Stream]:
    """(training, held-out) samples. The last `valid_fraction` of each part's documents is held out, rounded, at least one."""
    seq, seed = config.batch.seq_length_tokens, config.run.seed
    kept, held, shares = [], [], []
    for part in config.data.train:
        sequences, documents = read_pair(part.path)
        count = len(documents) - 1
        border = int(documents[count - max(round(count * config.data.valid_fraction), 1)])
        kept.append(Part(sequences[:border], seq, seed))
        held.append(Part(sequences[border:], seq, seed))
        shares.append(part.weight)
    return Stream(kept, shares, config, eod), Stream(held, shares, config, eod)
