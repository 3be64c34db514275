"""The order of samples in a weighted blend. In: weights. Out: `Blend.locate(sample) -> (part, number in part)`, and its inverse.

Megatron-Core's greedy rule always takes the part that is furthest behind its share. Here it makes a pattern of 2^20 samples,
and the pattern repeats. The order therefore doesn't depend on the length of the run, any sample is found in constant time, and
the pattern takes 10 MiB. The first 2^20 samples are those of Megatron-Core. The pattern meets each share to within one sample
in 2^20, so a part needs a share of at least 1e-5.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parallel.compat.megatron_helpers import blending_indices

PERIOD = 1 << 20


class Blend:
    """A repeating pattern of `period` samples. `weights`: one positive number a part, of any sum."""

    def __init__(self, weights: Sequence[float], period: int = PERIOD) -> None:
        self.period = period
        shares = np.asarray(weights, np.float64)
        shares = shares / shares.sum()
        self.parts, self.numbers = blending_indices(shares, period)
        self.counts = np.bincount(self.parts, minlength=len(shares))

    def locate(self, sample: int) -> tuple[int, int]:
        """(index of the part that gives this sample, number of samples that the part has given before it)."""
        turn, place = divmod(sample, self.period)
        part = int(self.parts[place])
        return part, turn * int(self.counts[part]) + int(self.numbers[place])

    def find(self, part: int, number: int) -> int:
        """The sample that is the part's sample `number`: the inverse of `locate`."""
        turn, place = divmod(number, int(self.counts[part]))
        return turn * self.period + int(np.flatnonzero(self.parts == part)[place])

    def counts_before(self, sample: int) -> np.ndarray:
        """How many samples each part has given before this one: int64 [parts]."""
        turn, place = divmod(sample, self.period)
        return turn * self.counts + np.bincount(self.parts[:place], minlength=len(self.counts))
