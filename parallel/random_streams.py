"""Seeds of the random streams that dropout and router jitter draw from.

In: the seed of the run, and where a rank stands in the grid of attention ranks. Out: the seed of its streams. Ranks that
hold other tokens (data and context ranks) and ranks that hold other layers (pipeline stages) get independent streams.
Tensor ranks share the seed: they must draw equal masks for activations that all of them hold. Megatron-Core adds the tensor
rank where activations are split between them.

Torch-free.
"""

from __future__ import annotations

import hashlib

# Megatron-Core adds small numbers to a seed, one for each of its streams; torch takes 64 bits.
_SEED_BYTES = 7


def stream_seed(seed: int, stage: int, data_rank: int, context_rank: int) -> int:
    """The seed of a rank, by its place in the layout: a rank elsewhere, or on another machine, never has the same one.

    The chunks of a stage draw from one stream, one after the other, and so never get equal masks.
    """
    place = f"{seed}/stage {stage}/data {data_rank}/context {context_rank}"
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:_SEED_BYTES], "little")
