"""Fill-in-the-middle: a document's middle is moved behind what surrounds it. In: tokens of a sample. Out: its tokens, and more.

The transformation is that of arXiv 2207.14255, on tokens: with data.fim.rate, a document is cut at two uniform places into
prefix, middle and suffix, and becomes PRE prefix SUF suffix MID middle, or with data.fim.spm_rate PRE SUF suffix MID prefix
middle. Each such document grows by three tokens. The draw depends on the seed and the
sample number alone, so it is the same under any layout and after any restart.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A shorter document has no prefix, middle and suffix.
_SHORTEST_TOKENS = 3
GROWTH_TOKENS = 3
"""By how much a document grows that is rearranged."""


@dataclass(frozen=True)
class FillInTheMiddle:
    """`rate`: share of the documents that are transformed. `spm_rate`: share of those with the suffix first. Ids of tokens."""

    rate: float
    spm_rate: float
    prefix_id: int
    middle_id: int
    suffix_id: int
    eod_id: int
    seed: int

    def random_of(self, sample_index: int) -> np.random.Generator:
        """The draws of a sample."""
        return np.random.default_rng([self.seed, sample_index])

    def transform(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """int64 [n] → int64 [n + 3 for each document that is rearranged]. End-of-document tokens stay behind their documents."""
        found = []
        for document in np.split(tokens, np.flatnonzero(tokens == self.eod_id) + 1):
            ends = bool(len(document)) and document[-1] == self.eod_id
            text, rest = (document[:-1], document[-1:]) if ends else (document, document[:0])
            # Two draws for each document, whatever is done with it: its neighbours' draws don't depend on its length.
            chosen, suffix_first = random.random(2) < (self.rate, self.spm_rate)
            first, second = sorted((random.random(2) * (len(text) + 1)).astype(int).tolist())
            if chosen and len(text) >= _SHORTEST_TOKENS:
                text = self._rearranged(text[:first], text[first:second], text[second:], bool(suffix_first))
            found += [text, rest]
        return np.concatenate(found)

    def _rearranged(self, prefix: np.ndarray, middle: np.ndarray, suffix: np.ndarray, suffix_first: bool) -> np.ndarray:
        pre, mid, suf = np.array([[self.prefix_id], [self.middle_id], [self.suffix_id]], np.int64)
        parts = [pre, suf, suffix, mid, prefix, middle] if suffix_first else [pre, prefix, suf, suffix, mid, middle]
        return np.concatenate(parts)
