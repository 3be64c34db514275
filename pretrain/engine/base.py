"""What an engine is: the owner of gradients and optimizer state. Both engines drive the same chunks with the same schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pretrain.data.batches import MicroBatch
from pretrain.model.tensor_slice import TensorSlice

# What a checkpoint holds of every parameter: fp32 main weights and Adam's two moments.
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")

# (loss, gradient norm) of a step before its update, equal on all ranks: may it be applied?
Accept = Callable[[float, float], bool]


def is_finite(loss: float, grad_norm: float) -> bool:
    """Whether loss and gradient norm are finite. Every step must satisfy this."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, equal on all ranks.

    `loss` is the mean over the global batch's valid tokens, in nats; `grad_norm` is the global norm before clipping.
    `applied` is False when the step was refused: weights, optimizer state and expert bias are then as before it.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    applied: bool


@dataclass(frozen=True)
class Piece:
    """Part of a canonical tensor that this rank holds: the flat range [start, stop) of `box`. `data` is 1-D."""

    kind: str
    name: str
    global_shape: tuple[int, ...]
    box: TensorSlice
    start: int
    stop: int
    data: torch.Tensor


class Engine(Protocol):
    name: str
    zero_stage: int

    def step(self, batches: Sequence[MicroBatch], learning_rate: float, accept: Accept = is_finite) -> StepResult:
        """Forward and backward on this rank's micro-batches of one global batch, and the update when `accept` allows it.

        `accept` is called once a step on every rank, and must answer alike on all of them.
        """
        ...

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """(sum of token losses, number of valid tokens) over the global batch, equal on all ranks."""
        ...

    def owned(self) -> Iterator[Piece]:
        """What this rank writes to a checkpoint: over all ranks, every element of every canonical tensor once."""
        ...

    def held(self, with_optimizer: bool) -> Iterator[Piece]:
        """What this rank must be given from a checkpoint; `data` is written in place, then `loaded` is called."""
        ...

    def loaded(self, optimizer_steps: int | None) -> None:
        """After `held` was filled: bring low-precision weights up to date; None starts a fresh optimizer."""
        ...

    def optimizer_steps(self) -> int:
        """Number of updates so far, as the optimizer's bias correction counts them."""
        ...
