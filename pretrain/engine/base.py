"""The interface of an engine, which owns gradients and optimizer state.

Both engines train the same chunks of the model with the same pipeline schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from configs.optimizer_schema import Optimizer
from parallel.muon import updates_with_muon
from pretrain.data.batches import MicroBatch
from pretrain.model.attention_logits import AttentionLogits
from pretrain.model.tensor_slice import TensorSlice

# The kinds of tensors that a checkpoint has: fp32 main weights of every parameter, and the state of its optimizer, which is
# AdamW's two moments or Muon's momentum.
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum"


def state_kinds(name: str, shape: tuple[int, ...], optimizer: Optimizer) -> tuple[str, ...]:
    """The kinds of optimizer state of a parameter, by its canonical name and shape."""
    return (MOMENTUM,) if updates_with_muon(name, shape, optimizer) else MOMENTS


# Takes loss and gradient norm of a step, equal on all ranks, before its update. Returns whether the update may be applied.
Accept = Callable[[float, float], bool]


def is_finite(loss: float, grad_norm: float) -> bool:
    """Whether loss and gradient norm are finite. Every step must satisfy this."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, equal on all ranks.

    `loss`: mean over the valid tokens of the global batch, in nats. `grad_norm`: global L2 norm before clipping.
    `num_tokens`: valid tokens of the global batch. `source_losses`: the loss of each shown source of a blend, by name.
    `applied`: False when the step was refused; weights, optimizer state and
    expert bias are then unchanged.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    applied: bool
    source_losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StateSlice:
    """A part of a canonical tensor on this rank: the flat range [start, stop) of `tensor_slice`.

    `kind`: WEIGHT, one of MOMENTS, MOMENTUM, or "rng". `name`: the canonical name. `data`: [stop - start].
    """

    kind: str
    name: str
    global_shape: tuple[int, ...]
    tensor_slice: TensorSlice
    start: int
    stop: int
    data: torch.Tensor


class Engine(Protocol):
    """The methods of both engines. `step`, `evaluate` and `loaded` are collective."""

    name: str
    zero_stage: int
    # The largest attention logits of the newest step; None: nobody asks for them.
    logits: AttentionLogits | None

    def step(self, batches: Sequence[MicroBatch], learning_rate: float, accept: Accept = is_finite) -> StepResult:
        """Forward and backward passes of this rank's micro-batches of one global batch, then the update if `accept` allows it.

        `accept` is called once a step on every rank and must return the same on all of them.
        """
        ...

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """(sum of token losses, number of valid tokens) over the global batch, equal on all ranks."""
        ...

    def owned_state(self) -> Iterator[StateSlice]:
        """The slices that this rank writes to a checkpoint. Over all ranks they have every element of every tensor once."""
        ...

    def local_state(self, with_optimizer: bool) -> Iterator[StateSlice]:
        """The slices that a checkpoint must fill on this rank. Write each `data` in place, then call `loaded`."""
        ...

    def loaded(self, optimizer_steps: int | None) -> None:
        """Update the low-precision weights after the slices of `local_state` were filled.

        `optimizer_steps`: the number of updates so far; None starts with a fresh optimizer.
        """
        ...

    def optimizer_steps(self) -> int:
        """The number of updates so far, which the optimizer's bias correction uses."""
        ...
