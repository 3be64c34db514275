"""The training loop: steps, refused steps, validation, saves, and the agreement of all ranks on when to end.

In: a `TrainingRun`. Out: `TrainingEnd`. This module knows neither W&B nor any path.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from pretrain.checkpoint.restore import TrainingPosition
from pretrain.checkpoint.saving import Saver
from pretrain.checkpoint.write import PENDING
from pretrain.data.batches import MicroBatch
from pretrain.divergence import ACCEPT, ROLLBACK, SKIP, STOP, RefusedStep, StepDecision
from pretrain.divergence_guard import DivergenceGuard
from pretrain.ending import TrainingEnd
from pretrain.engine.base import Engine
from pretrain.metrics.attention_metrics import attention_metrics
from pretrain.metrics.meter import Meter, peak_memory_gib
from pretrain.metrics.moe_metrics import MoeMetrics
from pretrain.rank.profiling import ProfileWindow
from pretrain.rank.speed_probe import SpeedProbe
from pretrain.rank.stop_signals import NONE, STATE_OF, StopSignals
from pretrain.records import Records
from pretrain.run.beat import AGREEING, COMPUTING, RECORDING, RESTORING, SAVING, VALIDATING, WAITING
from pretrain.schedule import learning_rate
from pretrain.training_data import TrainingData


@dataclass(frozen=True)
class RankPlace:
    """Where this rank is: its device, its pipeline stage (from 0), and how many stages there are."""

    device: torch.device
    stage: int
    num_stages: int


@dataclass(frozen=True)
class StepMeasures:
    """The measures of a step: router metrics, the numbers of its row, the profiler, the speed probe."""

    moe: MoeMetrics
    meter: Meter
    profile: ProfileWindow
    probe: SpeedProbe


@dataclass
class TrainingRun:
    """Everything that a step needs. `position` moves with each step; the other fields stay.

    `stop_step`: the last step. `horizon_steps`: the length of the learning-rate schedule.
    """

    config: Config
    place: RankPlace
    engine: Engine
    data: TrainingData
    measures: StepMeasures
    records: Records
    saver: Saver
    guard: DivergenceGuard
    signals: StopSignals
    position: TrainingPosition
    stop_step: int
    horizon_steps: int


@dataclass(frozen=True)
class Agreement:
    """The values on which all ranks agree after a step.

    `requested`: the strongest request to stop. `save_pending`: some rank is still writing its part of a save. `memory_gib`: the
    peak memory of each pipeline stage.
    """

    requested: int
    save_pending: bool
    memory_gib: list[float]


def train(run: TrainingRun) -> TrainingEnd:
    """Train until the last step, a request to stop, or a refused step that ends the run. Closes `run.data`. Collective."""
    try:
        return _train(run)
    finally:
        run.data.close()


def _train(run: TrainingRun) -> TrainingEnd:
    while run.position.step < run.stop_step:
        step = run.position.step + 1
        run.measures.profile.before(step)
        row, decision, after = _step(run)
        if decision.action in (STOP, ROLLBACK):
            if ended := _stop_or_roll_back(run, row, decision):
                return ended
            continue
        if decision.action == SKIP:
            row["skipped"] = True
            run.guard.announce_skip(RefusedStep.of(row, decision))
        # Experts take the padding of packed samples too.
        step_inputs = (after.consumed_samples - run.position.consumed_samples) * run.config.batch.seq_length_tokens
        run.position = after
        agreed = agree(run)
        if _validation_due(run):
            run.signals.beat.enter(VALIDATING)
            row |= validate(run)
        run.signals.beat.enter(RECORDING)
        run.records.write(row | {f"memory_gib/stage_{i}": round(gib, 4) for i, gib in enumerate(agreed.memory_gib)})
        run.records.write_expert_counts(step, step_inputs, run.measures.moe.expert_counts)
        run.measures.profile.after(step)
        run.measures.probe.after(step)
        _save_if_due(run, agreed)
        if agreed.requested != NONE:
            name = run.signals.signal_name or "a signal to another rank"
            return _end(run, STATE_OF[agreed.requested], f"{name} after step {step}")
    return _end(run, "finished", f"all {run.stop_step} steps are done")


def _step(run: TrainingRun) -> tuple[dict[str, Any], StepDecision, TrainingPosition]:
    """One optimizer step. Returns its row, the policy's decision, and the position after the step if the step counts."""
    config, before = run.config, run.position
    started_s = time.perf_counter()
    run.signals.beat.enter(WAITING, before.step + 1)
    global_batch_seqs, tokens, batches = run.data.next()
    run.signals.beat.enter(COMPUTING)
    rate = learning_rate(before.step, config.optimizer, config.schedule, run.horizon_steps)
    decision = StepDecision(STOP, "the engine asked nobody")

    def accept(loss: float, grad_norm: float) -> bool:
        nonlocal decision
        decision = run.guard.judge(loss, grad_norm)
        return decision.action == ACCEPT

    result = run.engine.step(batches, rate, accept)
    assert result.applied == (decision.action == ACCEPT), f"the engine did not heed {decision}"
    moe = run.measures.moe.take(len(batches), config.metrics.expert_load_layers)
    after = TrainingPosition(before.step + 1, before.consumed_samples + global_batch_seqs, before.tokens + tokens)
    row = run.measures.meter.row(after, result, rate, tokens, time.perf_counter() - started_s)
    if run.engine.logits is not None:
        row |= attention_metrics(*run.engine.logits.by_layer(), config.metrics.attention_logit_layers)
    row |= {f"loss/{name}": loss for name, loss in result.source_losses.items()}
    return row | moe | ({} if result.applied else {"applied": False}), decision, after


def _stop_or_roll_back(run: TrainingRun, row: dict[str, Any], decision: StepDecision) -> TrainingEnd | None:
    """End the run after a refused step, or roll it back and return None. The run then continues after the refused batch."""
    refused, rule = RefusedStep.of(row, decision), decision.rule
    run.signals.beat.enter(RECORDING)
    run.records.write(row)
    if decision.action == ROLLBACK:
        run.signals.beat.enter(RESTORING)
        run.saver.settle()
        run.data.close()
        if position := run.guard.roll_back(refused):
            run.position = position
            run.saver.last_step = position.step
            run.data.restart_at(position)
            return None
        rule += "; there is no earlier checkpoint to roll back to"
    run.guard.announce_end(replace(refused, rule=rule))
    return _end(run, "diverged", f"step {refused.step} was not applied: {rule}")


def agree(run: TrainingRun) -> Agreement:
    """Exchange requests, save states and memory. Costs one all-reduce of 2 + num_stages numbers over all ranks."""
    run.signals.beat.enter(AGREEING)
    status = run.saver.writer.status
    flags = torch.zeros(2 + run.place.num_stages, dtype=torch.float64, device=run.place.device)
    flags[0] = run.signals.requested
    flags[1] = status == PENDING
    flags[2 + run.place.stage] = peak_memory_gib(run.place.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    requested, pending, *memory = flags.tolist()
    return Agreement(int(requested), bool(pending), memory)


def _validation_due(run: TrainingRun) -> bool:
    interval, step = run.config.run.eval_interval_steps, run.position.step
    return bool(run.data.validation) and (step == run.stop_step or bool(interval and step % interval == 0))


def validate(run: TrainingRun) -> dict[str, float]:
    """The mean loss over each set of validation batches, in nats a token, by its key. Collective."""
    return {key: _mean_loss(run.engine, batches) for key, batches in run.data.validation.items()}


def _mean_loss(engine: Engine, global_batches: list[list[MicroBatch]]) -> float:
    totals = [engine.evaluate(batches) for batches in global_batches]
    return math.fsum(loss for loss, _ in totals) / max(sum(tokens for _, tokens in totals), 1)


def _save_if_due(run: TrainingRun, agreed: Agreement) -> None:
    saver, step = run.saver, run.position.step
    if saver.writer.status is not None and not agreed.save_pending:
        run.signals.beat.enter(SAVING)
        saver.settle()
    if saver.is_due(step):
        run.signals.beat.enter(SAVING)
        saver.save(run.position)


def _end(run: TrainingRun, state: str, why: str) -> TrainingEnd:
    """Save at the end if the config asks for it, wait for the save, and return the outcome."""
    saver = run.saver
    run.signals.beat.enter(SAVING)
    if saver.at_end and state != "diverged" and run.position.step > 0:
        saver.save(run.position)
    saver.settle()
    if saver.error:
        return TrainingEnd("failed", f"{why}; the last save failed: {saver.error}", run.position)
    return TrainingEnd(state, why, run.position)
