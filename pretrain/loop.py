"""The training loop: steps, validation, saves, and the agreement of all ranks on when to end.

In: a `Run` with everything built. Out: the state in which the attempt ended. It knows neither W&B nor any path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from parallel.batch import global_batch_at
from parallel.layout import Layout
from pretrain.batches import MicroBatch, Prefetcher
from pretrain.checkpoint_write import PENDING, CheckpointWriter
from pretrain.engine.base import Engine, StepResult
from pretrain.metrics import Meter, peak_memory_gib
from pretrain.moe_metrics import MoeMetrics
from pretrain.profiling import ProfileWindow
from pretrain.restore import Position
from pretrain.schedule import learning_rate
from pretrain.sinks import Sink
from pretrain.stop import NONE, STATE_OF, StopSignals

GlobalBatch = tuple[int, list[MicroBatch]]


@dataclass(frozen=True)
class Ended:
    """How the loop ended: a state of configs/run_folder.py and one line for people."""

    state: str
    why: str
    position: Position


@dataclass
class Run:
    """Everything that a step needs. `batches` yields (sequences of the global batch, this rank's micro-batches)."""

    config: Config
    layout: Layout
    device: torch.device
    stage: int
    engine: Engine
    batches: Prefetcher[GlobalBatch]
    validation: list[list[MicroBatch]]
    moe: MoeMetrics
    meter: Meter
    profile: ProfileWindow
    sink: Sink
    stop: StopSignals
    saver: Saver
    position: Position
    stop_step: int
    horizon_steps: int


@dataclass
class Saver:
    """When to save, and what follows a save. `begin(position)` starts one; `published(folder, error)` hears of its end."""

    writer: CheckpointWriter
    interval_steps: int | None
    at_end: bool
    begin: Callable[[Position], None]
    published: Callable[[Path, str | None], None]
    last_step: int = -1
    error: str | None = None

    def save(self, position: Position) -> None:
        """Start a save of this position, after the one under way. Collective."""
        if self.last_step == position.step:
            return
        self.settle()
        self.begin(position)
        self.last_step = position.step
        if not self.writer.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way, if any, and complete it. Collective: every rank knows of the same saves."""
        if self.writer.status is not None:
            folder, self.error = self.writer.finish()
            self.published(folder, self.error)


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step: the strongest request to stop, whether a save is done, memory of each stage."""

    requested: int
    save_pending: bool
    memory_gib: list[float]


def train(run: Run) -> Ended:
    """Step until the last one, a request to stop, or a loss that is no number. Collective."""
    while run.position.step < run.stop_step:
        step = run.position.step + 1
        run.stop.phase = f"step {step}"
        run.profile.before(step)
        row, result = _step(run)
        if not result.applied:
            run.sink.write(row)
            return _end(run, "diverged", f"loss {result.loss} and gradient norm {result.grad_norm} at step {step}: not applied")
        agreed = agree(run)
        if _validation_due(run):
            run.stop.phase = f"validation after step {step}"
            row["val_loss"] = validate(run)
        run.sink.write(row | {f"memory_gib/stage_{i}": round(gib, 4) for i, gib in enumerate(agreed.memory_gib)})
        run.profile.after(step)
        _save_if_due(run, agreed)
        if agreed.requested != NONE:
            name = run.stop.signal_name or "a signal to another rank"
            return _end(run, STATE_OF[agreed.requested], f"{name} after step {step}")
    return _end(run, "finished", f"all {run.stop_step} steps are done")


def _step(run: Run) -> tuple[dict[str, Any], StepResult]:
    """One optimizer step; moves `run.position` when it was applied."""
    config, before = run.config, run.position
    started_s = time.perf_counter()
    global_batch_seqs, batches = next(run.batches)
    rate = learning_rate(before.step, config.optimizer, config.schedule, run.horizon_steps)
    result = run.engine.step(batches, rate)
    moe = run.moe.take(len(batches), config.metrics.expert_load_layers)
    tokens = global_batch_seqs * config.batch.seq_length_tokens
    after = Position(before.step + 1, before.consumed_samples + global_batch_seqs, before.tokens + tokens)
    row = run.meter.row(after, result, rate, tokens, time.perf_counter() - started_s)
    if result.applied:
        run.position = after
    return row | moe, result


def agree(run: Run) -> Agreement:
    """One all-reduce of a few numbers over all ranks."""
    status = run.saver.writer.status
    flags = torch.zeros(2 + run.layout.pipeline, dtype=torch.float64, device=run.device)
    flags[0] = run.stop.requested
    flags[1] = status == PENDING
    flags[2 + run.stage] = peak_memory_gib(run.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    requested, pending, *memory = flags.tolist()
    return Agreement(int(requested), bool(pending), memory)


def _validation_due(run: Run) -> bool:
    interval, step = run.config.run.eval_interval_steps, run.position.step
    return bool(run.validation) and (step == run.stop_step or bool(interval and step % interval == 0))


def validate(run: Run) -> float:
    """Mean loss over the held-out batches, in nats a token."""
    totals = [run.engine.evaluate(batches) for batches in run.validation]
    return math.fsum(loss for loss, _ in totals) / max(sum(tokens for _, tokens in totals), 1)


def _save_if_due(run: Run, agreed: Agreement) -> None:
    saver, step = run.saver, run.position.step
    if saver.writer.status is not None and not agreed.save_pending:
        saver.settle()
    if saver.interval_steps and step % saver.interval_steps == 0:
        run.stop.phase = f"saving step {step}"
        saver.save(run.position)


def _end(run: Run, state: str, why: str) -> Ended:
    """Save what is worth keeping, wait for it, and say how it ended."""
    saver = run.saver
    run.stop.phase = f"saving step {run.position.step}"
    if saver.at_end and state != "diverged" and run.position.step > 0:
        saver.save(run.position)
    saver.settle()
    if saver.error:
        return Ended("failed", f"{why}; the last save failed: {saver.error}", run.position)
    return Ended(state, why, run.position)


def batch_positions(config: Config, start: Position, stop_step: int) -> Iterator[tuple[int, int]]:
    """(first sample, sequences) of each global batch from `start` to the last step, the ramp followed."""
    consumed = start.consumed_samples
    for _ in range(start.step, stop_step):
        size = global_batch_at(config.batch, consumed)
        yield consumed, size
        consumed += size
