"""The largest attention logits as metrics. In: maxima by layer. Out: numbers by name.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pretrain.metrics.spread import spread


def attention_metrics(layers: Sequence[float], prediction: float, shown_layers: int) -> dict[str, float]:
    """`max_attention_logit`: the largest of a step. One number more for each of `shown_layers` evenly spread layers.

    `layers`: of each layer of the model, -inf where it has no attention. `prediction`: of multi-token prediction, which has no
    number of its own.
    """
    seen = [layer for layer, largest in enumerate(layers) if largest > -math.inf]
    shown = {f"max_attention_logit/layer_{seen[at]}": layers[seen[at]] for at in spread(len(seen), shown_layers)}
    return {"max_attention_logit": max(*layers, prediction)} | shown
