"""The losses of multi-token prediction, summed with their tokens: megatron-core keeps means only.

In: Megatron-Core's forward passes. Out: for each depth the sum of token losses and the number of valid tokens on this rank,
so that their ratio over all ranks is the mean over the valid tokens of the global batch (DeepSeek-V3, arXiv 2412.19437,
equation 24), however the batch is cut.

Fault (megatron-core 0.16.1): it tracks the mean of each rank's part of each micro-batch. Under context parallelism the parts
have different numbers of valid tokens, and a part without any has the mean NaN. Symptom: `mtp_loss` depends on the layout.
"""

from __future__ import annotations

from typing import Any

import torch

from parallel.compat.private_names import LibraryImports, require_names

with LibraryImports(__name__):
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer import multi_token_prediction
require_names(__name__)

_TOTALS = "phalanx_totals"
_TOKENS = "phalanx_tokens"


def sum_prediction_losses() -> None:
    """From now on forward passes of this process sum losses and tokens, for `take_prediction_losses`."""
    gpt_model.roll_tensor = _roll_and_count
    multi_token_prediction.MTPLossLoggingHelper.save_loss_to_tracker = staticmethod(_sum_loss)  # type: ignore[method-assign]


def take_prediction_losses(num_depths: int, device: torch.device) -> torch.Tensor:
    """float64 [depths, 2]: this rank's sum of token losses, and its valid tokens, since the last call."""
    totals = _tracker().pop(_TOTALS, None)
    return torch.zeros(num_depths, 2, dtype=torch.float64, device=device) if totals is None else totals


def _tracker() -> dict[str, Any]:
    return multi_token_prediction.MTPLossLoggingHelper.tracker


def _roll_and_count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTModel rolls labels, then the loss mask, for each depth: the last count is that of the depth's valid tokens."""
    rolled, num_tokens = multi_token_prediction.roll_tensor(tensor, *args, **kwargs)
    _tracker()[_TOKENS] = num_tokens
    return rolled, num_tokens


def _sum_loss(mean: torch.Tensor, depth: int | None, num_depths: int, *args: Any, **kwargs: Any) -> None:
    """`mean`: of the rank's valid tokens; 0 / 0 where there is none."""
    if depth is None:
        return
    tracker = _tracker()
    totals = tracker.setdefault(_TOTALS, torch.zeros(num_depths, 2, dtype=torch.float64, device=mean.device))
    tokens = tracker[_TOKENS].detach().double()
    totals[depth, 0] += torch.where(tokens > 0, mean.detach().double() * tokens, 0.0)
    totals[depth, 1] += tokens
