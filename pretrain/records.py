"""Where the rows of an attempt go: the record and the sinks that copy it. In: an open session, restored. Out: `Records`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from parallel.architecture import moe_layers
from pretrain.metrics.console import make_console
from pretrain.metrics.expert_counts import ExpertCounts
from pretrain.metrics.prometheus import make_prometheus_sink
from pretrain.metrics.sinks import RecordSink, Sink, Sinks
from pretrain.metrics.wandb_sink import make_store_sink, make_wandb_sink
from pretrain.resume import Restored
from pretrain.run.folder import Outcome
from pretrain.run.journal import say
from pretrain.run.record import Record
from pretrain.session import RankZero, Session


class Records:
    """Rank 0's open record and sinks. The other ranks have none, and every method does nothing there."""

    def __init__(self, opened: OpenRecords | None) -> None:
        self._opened = opened

    def write(self, row: dict[str, Any]) -> None:
        """One step's row, complete. A row that the disk refuses waits in memory."""
        if self._opened is not None:
            self._opened.sink.write(row)

    def write_expert_counts(self, step: int, tokens: int, counts_of: Callable[[int], list[list[int]]]) -> None:
        """Where the step is due, a row of experts.jsonl: `counts_of(tokens)`, with the step's tokens over all ranks."""
        if self._opened is not None and self._opened.experts.is_due(step):
            self._opened.experts.append(step, tokens, counts_of(tokens))

    def sync_before_save(self) -> str | None:
        """Force every row and event that the next checkpoint claims to the disk. Returns why the disk refuses; None: it does not.

        Raises ConfigError when the folder is no longer ours.
        """
        if self._opened is None:
            return None
        try:
            self._opened.check_held()
        except OSError as error:
            return f"the lock file can't be read ({error.strerror or error})"
        try:
            self._opened.sync()
        except ConfigError as error:
            return error.problems[0].rule
        return None

    def roll_back_to(self, step: int) -> None:
        """Remove the rows past `step`; a file of the attempt's launch folder keeps them. Raises ConfigError."""
        if self._opened is not None:
            self._opened.roll_back_to(step)


class OpenRecords:
    """The record with its sinks, on rank 0. `cut_rows`: the file that keeps the rows that this attempt cuts."""

    def __init__(
        self,
        record: Record,
        experts: ExpertCounts,
        sink: Sink,
        cut_rows: Path,
        check_held: Callable[[], None],
        sync_events: Callable[[], None],
    ) -> None:
        self.sink = sink
        self.experts = experts
        self.check_held = check_held
        self._sync_events = sync_events
        self._record = record
        self._cut_rows = cut_rows

    def roll_back_to(self, step: int) -> None:
        self._record.cut_back(step, self._cut_rows)
        self.experts.cut_back(step)
        self.sink.show_message(f"rolled back to step {step}")

    def sync(self) -> None:
        """Force rows and events to the disk. Raises ConfigError when it refuses."""
        self._record.sync()
        self._sync_events()

    def close(self, outcome: Outcome) -> None:
        self.sink.close(outcome)


def open_records(session: Session, restored: Restored) -> Records:
    """Cut the record back to the restored step and open it with the sinks of the config. Closed when the session ends."""
    if session.rank_zero is None:
        return Records(None)
    opened = _open_on_rank_zero(session, session.rank_zero, restored.position.step)
    session.ending.close_at_end(opened)
    if restored.position.step:
        opened.sink.show_message(f"resumed at step {restored.position.step}")
    return Records(opened)


def _open_on_rank_zero(session: Session, rank_zero: RankZero, step: int) -> OpenRecords:
    context, attempt = session.context, rank_zero.attempt
    config, cut_rows = context.config, attempt.own_dir / "metrics_cut.jsonl"
    record = Record.open(context.folder.metrics, step, session.journal.tell, cut_rows)
    layers = [layer for layer, is_moe in enumerate(moe_layers(config.model)) if is_moe]
    interval_steps = config.metrics.expert_counts_interval_steps
    experts = ExpertCounts(context.folder.experts, layers, config.model.moe.num_experts, interval_steps, say)
    experts.cut_back(step)
    sinks: list[Sink] = [RecordSink(record)]
    if "console" in config.metrics.sinks:
        sinks.append(make_console(context.stop_step, config.metrics.log_interval_steps))
    sinks.append(make_wandb_sink(config, context.folder, attempt.wandb_id, os.environ))
    for kind in ("tensorboard", "mlflow"):
        sinks.append(make_store_sink(kind, config, context.folder, attempt.wandb_id, os.environ))
    sinks.append(make_prometheus_sink(config.run.name, config.metrics.prometheus_port))
    return OpenRecords(record, experts, Sinks(sinks), cut_rows, attempt.check_held, session.journal.sync)
