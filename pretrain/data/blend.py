"""Which part of a weighted blend gives which sample. In: weights. Out: `Blend.locate(sample) -> (part, number in part)`.

Megatron-Core's greedy rule (always the part that lags its share most) makes a pattern of 2^20 samples, which repeats. So
the order needs no horizon, any sample is found at once, and memory is 10 MiB whatever the run's length. The first 2^20
samples are Megatron's own; shares are kept to one sample in 2^20, which is why a part needs a share of 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from megatron.core.datasets import helpers

PERIOD = 1 << 20


class Blend:
    def __init__(self, weights: Sequence[float], period: int = PERIOD) -> None:
        self.period = period
        shares = np.asarray(weights, np.float64)
        shares = shares / shares.sum()
        self.parts = np.zeros(period, np.int16)
        self.numbers = np.zeros(period, np.int64)
        helpers.build_blending_indices(self.parts, self.numbers, shares, len(shares), period, False)  # pyright: ignore
        self.counts = np.bincount(self.parts, minlength=len(shares))

    def locate(self, sample: int) -> tuple[int, int]:
        """(part, how many samples that part has given before)."""
        turn, place = divmod(sample, self.period)
        part = int(self.parts[place])
        return part, turn * int(self.counts[part]) + int(self.numbers[place])
