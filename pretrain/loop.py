"""The training loop: steps, what follows a step that may not be applied, validation, saves, and the agreement on when to end.

In: a `Run` with everything built. Out: the state in which the attempt ended. It knows neither W&B nor any path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from parallel.batch import global_batch_at
from parallel.layout import Layout
from pretrain.checkpoint.restore import Position
from pretrain.checkpoint.saving import Saver
from pretrain.checkpoint.write import PENDING
from pretrain.data.batches import MicroBatch, Prefetcher
from pretrain.divergence import ACCEPT, ROLLBACK, SKIP, STOP, Decision, Policy, Refused
from pretrain.engine.base import Engine
from pretrain.metrics.meter import Meter, peak_memory_gib
from pretrain.metrics.moe_metrics import MoeMetrics
from pretrain.metrics.sinks import Sink
from pretrain.rank.profiling import ProfileWindow
from pretrain.rank.speed_probe import SpeedProbe
from pretrain.rank.stop_signals import NONE, STATE_OF, StopSignals
from pretrain.run.beat import AGREEING, COMPUTING, RECORDING, RESTORING, SAVING, VALIDATING, WAITING
from pretrain.run.events import EventKind
from pretrain.run.heartbeat import Heartbeat
from pretrain.schedule import learning_rate

GlobalBatch = tuple[int, list[MicroBatch]]


@dataclass(frozen=True)
class Ended:
    """How the loop ended: a state of pretrain/run/folder.py and one line for people."""

    state: str
    why: str
    position: Position


@dataclass
class Run:
    """Everything that a step needs. `batches` yields (sequences of the global batch, this rank's micro-batches).

    `read` makes them anew from a position; `roll_back` fills the engine from an earlier checkpoint and says where the run
    stands then (None: there is none); `say` tells people and the events, on rank 0.
    """

    config: Config
    layout: Layout
    device: torch.device
    stage: int
    engine: Engine
    read: Callable[[Position], Prefetcher[GlobalBatch]]
    batches: Prefetcher[GlobalBatch]
    validation: list[list[MicroBatch]]
    moe: MoeMetrics
    meter: Meter
    profile: ProfileWindow
    sink: Sink
    stop: StopSignals
    beat: Heartbeat
    probe: SpeedProbe
    saver: Saver
    policy: Policy
    roll_back: Callable[[Refused], tuple[Position, Policy] | None]
    say: Callable[..., None]
    position: Position
    stop_step: int
    horizon_steps: int


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step: the strongest request to stop, whether a save is done, memory of each stage."""

    requested: int
    save_pending: bool
    memory_gib: list[float]


def train(run: Run) -> Ended:
    """Step until the last one, a request to stop, or a step whose refusal ends the run. Closes `run.batches`. Collective."""
    try:
        return _train(run)
    finally:
        run.batches.close()


def _train(run: Run) -> Ended:
    while run.position.step < run.stop_step:
        step = run.position.step + 1
        run.profile.before(step)
        row, decision, after = _step(run)
        if decision.action in (STOP, ROLLBACK):
            if ended := _stop_or_roll_back(run, row, decision):
                return ended
            continue
        if decision.action == SKIP:
            row["skipped"] = True
            run.say(EventKind.SKIPPED_STEP, **Refused.of(row, decision).as_fields())
        run.position = after
        agreed = agree(run)
        if _validation_due(run):
            run.beat.enter(VALIDATING)
            row["val_loss"] = validate(run)
        run.beat.enter(RECORDING)
        run.sink.write(row | {f"memory_gib/stage_{i}": round(gib, 4) for i, gib in enumerate(agreed.memory_gib)})
        run.profile.after(step)
        run.probe.after(step)
        _save_if_due(run, agreed)
        if agreed.requested != NONE:
            name = run.stop.signal_name or "a signal to another rank"
            return _end(run, STATE_OF[agreed.requested], f"{name} after step {step}")
    return _end(run, "finished", f"all {run.stop_step} steps are done")


def _step(run: Run) -> tuple[dict[str, Any], Decision, Position]:
    """One optimizer step: its row, what the policy decided, where the run stands when the step counts."""
    config, before = run.config, run.position
    started_s = time.perf_counter()
    run.beat.enter(WAITING, before.step + 1)
    global_batch_seqs, batches = next(run.batches)
    run.beat.enter(COMPUTING)
    rate = learning_rate(before.step, config.optimizer, config.schedule, run.horizon_steps)
    decision = Decision(STOP, "the engine asked nobody")

    def accept(loss: float, grad_norm: float) -> bool:
        nonlocal decision
        decision = run.policy.judge(loss, grad_norm)
        return decision.action == ACCEPT

    result = run.engine.step(batches, rate, accept)
    assert result.applied == (decision.action == ACCEPT), f"the engine did not heed {decision}"
    moe = run.moe.take(len(batches), config.metrics.expert_load_layers)
    tokens = global_batch_seqs * config.batch.seq_length_tokens
    after = Position(before.step + 1, before.consumed_samples + global_batch_seqs, before.tokens + tokens)
    row = run.meter.row(after, result, rate, tokens, time.perf_counter() - started_s)
    return row | moe | ({} if result.applied else {"applied": False}), decision, after


def _stop_or_roll_back(run: Run, row: dict[str, Any], decision: Decision) -> Ended | None:
    """The end of the run, or None: it stands at an earlier checkpoint, with the refused batch behind it."""
    refused, rule = Refused.of(row, decision), decision.rule
    run.beat.enter(RECORDING)
    run.sink.write(row)
    if decision.action == ROLLBACK:
        run.beat.enter(RESTORING)
        run.saver.settle()
        run.batches.close()
        if found := run.roll_back(refused):
            run.position, run.policy = found
            run.saver.last_step = run.position.step
            run.batches = run.read(run.position)
            return None
        rule += "; there is no earlier checkpoint to roll back to"
    run.say(EventKind.DIVERGED, **replace(refused, rule=rule).as_fields())
    return _end(run, "diverged", f"step {refused.step} was not applied: {rule}")


def agree(run: Run) -> Agreement:
    """One all-reduce of a few numbers over all ranks."""
    run.beat.enter(AGREEING)
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
        run.beat.enter(SAVING)
        saver.settle()
    if saver.is_due(step):
        run.beat.enter(SAVING)
        saver.save(run.position)


def _end(run: Run, state: str, why: str) -> Ended:
    """Save what is worth keeping, wait for it, and say how it ended."""
    saver = run.saver
    run.beat.enter(SAVING)
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
