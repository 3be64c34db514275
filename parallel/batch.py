"""Sequences and steps: the global batch, its micro-batches, and the ramp, in exact integer arithmetic.

In: the `batch` and `run` sections. Out: how many sequences a step consumes, where a step stands in the data, and how many
steps a number of tokens takes. Nothing here depends on the layout except `num_micro_batches`.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs.schema import Batch, Config


@dataclass(frozen=True)
class Plateau:
    """Consecutive steps of one global batch size. `num_steps` is None on the last, which never ends."""

    first_step: int
    first_seqs: int  # sequences consumed before it
    global_batch_seqs: int
    num_steps: int | None


def num_increments(batch: Batch) -> int:
    """Increments of the ramp; 0 without one."""
    start = batch.ramp.start_seqs
    return 0 if start is None else (batch.global_batch_seqs - start) // batch.ramp.increment_seqs


def global_batch_at(batch: Batch, consumed_seqs: int) -> int:
    """Sequences of the step that begins after `consumed_seqs`: start + floor(consumed x increments / samples) increments."""
    increments = num_increments(batch)
    if increments == 0 or consumed_seqs >= batch.ramp.samples:
        return batch.global_batch_seqs
    assert batch.ramp.start_seqs is not None, "a ramp without a start has no increments"
    return batch.ramp.start_seqs + consumed_seqs * increments // batch.ramp.samples * batch.ramp.increment_seqs


def plateaus(batch: Batch) -> Iterator[Plateau]:
    """The steps of a run as plateaus of equal batch size: one more than the ramp's increments at most."""
    step = consumed = 0
    while (size := global_batch_at(batch, consumed)) < batch.global_batch_seqs:
        # The batch grows where consumed x increments reaches the next multiple of samples.
        increments, samples = num_increments(batch), batch.ramp.samples
        boundary = -(-(consumed * increments // samples + 1) * samples // increments)
        steps = -(-(boundary - consumed) // size)
        yield Plateau(step, consumed, size, steps)
        step, consumed = step + steps, consumed + steps * size
    yield Plateau(step, consumed, batch.global_batch_seqs, None)


def consumed_seqs_after(batch: Batch, steps: int) -> int:
    """Sequences consumed by the first `steps` steps."""
    plateau = next(p for p in plateaus(batch) if p.num_steps is None or steps <= p.first_step + p.num_steps)
    return plateau.first_seqs + (steps - plateau.first_step) * plateau.global_batch_seqs


def steps_for(batch: Batch, seqs: int) -> int:
    """The fewest steps that consume at least `seqs` sequences."""
    for plateau in plateaus(batch):
        steps = -(-(seqs - plateau.first_seqs) // plateau.global_batch_seqs)
        if plateau.num_steps is None or steps <= plateau.num_steps:
            return plateau.first_step + max(steps, 0)
    raise AssertionError("the last plateau never ends")


def num_micro_batches(batch: Batch, data_size: int, global_batch_seqs: int) -> int:
    """Forward passes of one rank in a step of `global_batch_seqs`."""
    at_once = batch.micro_batch_seqs * data_size
    assert global_batch_seqs % at_once == 0, f"{global_batch_seqs} sequences don't divide by {at_once}: check_config comes first"
    return global_batch_seqs // at_once


def deciding_batches(batch: Batch) -> tuple[int, ...]:
    """The global batch and the first two of the ramp: when a number divides these, it divides every batch of the run."""
    start, final = batch.ramp.start_seqs, batch.global_batch_seqs
    first = [] if start is None else [start, start + batch.ramp.increment_seqs]
    return (*(size for size in first if size < final), final)


def steps_of(config: Config) -> int:
    """Steps after which the run stops: run.steps, or run.tokens rounded up to a step (the ramp counted)."""
    if config.run.steps is not None:
        return config.run.steps
    assert config.run.tokens is not None, "run.steps or run.tokens is set: check_config comes first"
    return steps_for(config.batch, -(-config.run.tokens // config.batch.seq_length_tokens))


def horizon_steps(config: Config) -> int:
    """Steps of the learning rate schedule: schedule.horizon_steps, or the run's steps.

    A resumed run must pass the first attempt's horizon on, or the schedule would stretch with run.steps.
    """
    return config.schedule.horizon_steps or steps_of(config)
