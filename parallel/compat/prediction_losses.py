"""The losses of multi-token prediction, summed with their tokens: megatron-core keeps means only.

In: Megatron-Core's forward passes. Out: for each depth the sum of token losses and the number of valid tokens on this rank,
so that their ratio over all ranks is the mean over the valid tokens of the global batch (DeepSeek-V3, arXiv 2412.19437,
equation 24), however the batch is cut.

Faults:
1. All versions track the mean of each rank's part of each micro-batch. Under context parallelism the parts have different
   numbers of valid tokens, and a part without any has the mean NaN. Symptom: `mtp_loss` depends on the layout.
2. From megatron-core 0.17 on, with calculate_per_token_loss, a depth's loss is multiplied by the rank's valid tokens over
   those that the depth still has. The sum over ranks is then no multiple of the definition's. Symptom: the gradient depends on
   the context parallel degree, and on how a batch is cut.
"""

from __future__ import annotations

from typing import Any

import torch

from parallel.compat.private_names import LibraryImports, replaced, require_names
from parallel.compat.versions import megatron_is_between

with LibraryImports(__name__):
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer import multi_token_prediction
require_names(__name__)

_TOTALS = "phalanx_totals"
_TOKENS = "phalanx_tokens"
_DIVISOR = "phalanx_divisor"
_ROLL = multi_token_prediction.roll_tensor


def sum_prediction_losses() -> None:
    """From now on forward passes of this process sum losses and tokens, for `take_prediction_losses`."""
    helper: Any = multi_token_prediction.MTPLossLoggingHelper
    model: Any = gpt_model
    if megatron_is_between("0.16.1", "0.16"):
        model.roll_tensor = _roll_and_count
    elif model.process_mtp_loss is not _process:
        _process.original = model.process_mtp_loss  # type: ignore[attr-defined]
        model.process_mtp_loss = _process
    if megatron_is_between("0.19"):
        helper.save_metrics_to_tracker = staticmethod(_sum_loss_of_metrics)
    else:
        helper.save_loss_to_tracker = staticmethod(_sum_loss)


def take_prediction_losses(num_depths: int, device: torch.device) -> torch.Tensor:
    """float64 [depths, 2]: this rank's sum of token losses, and its valid tokens, since the last call."""
    totals = _tracker().pop(_TOTALS, None)
    return torch.zeros(num_depths, 2, dtype=torch.float64, device=device) if totals is None else totals


def _tracker() -> dict[str, Any]:
    return multi_token_prediction.MTPLossLoggingHelper.tracker


def _process(*args: Any, loss_mask: torch.Tensor | None, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Megatron-Core's own pass over the depths, in which each depth is divided by the valid tokens of the whole mask."""
    divisor = (torch.ones_like(labels) if loss_mask is None else loss_mask).sum()

    def roll(tensor: torch.Tensor, *rolled: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _roll_and_count(tensor, *rolled, **options)[0], divisor

    _tracker()[_DIVISOR] = divisor
    with replaced(multi_token_prediction, "roll_tensor", roll):
        return _process.original(*args, loss_mask=loss_mask, labels=labels, **kwargs)  # type: ignore[attr-defined]


def _roll_and_count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels are rolled, then the loss mask, for each depth: the last count is that of the depth's valid tokens."""
    rolled, num_tokens = _ROLL(tensor, *args, **kwargs)
    _tracker()[_TOKENS] = num_tokens
    return rolled, num_tokens


def _sum_loss(mean: torch.Tensor, depth: int | None, num_depths: int, *args: Any, **kwargs: Any) -> None:
    """`mean`: of the rank's token losses, over the count that Megatron-Core was given; 0 / 0 where there is none."""
    if depth is None:
        return
    tracker = _tracker()
    totals = tracker.setdefault(_TOTALS, torch.zeros(num_depths, 2, dtype=torch.float64, device=mean.device))
    tokens = tracker[_TOKENS].detach().double()
    divisor = tracker.get(_DIVISOR, tracker[_TOKENS]).detach().double()
    totals[depth, 0] += torch.where(divisor > 0, mean.detach().double() * divisor, 0.0)
    totals[depth, 1] += tokens


def _sum_loss_of_metrics(mean: torch.Tensor, correct: Any, total: Any, *args: Any, **kwargs: Any) -> None:
    """The same for versions that also count right guesses."""
    _sum_loss(mean, *args, **kwargs)
