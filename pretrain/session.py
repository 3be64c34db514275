"""One attempt of a run on all ranks: who holds the folder, where it goes on, what is written, how it ends.

Rank 0 reads and writes the run folder; what it finds is told to the others. Every refusal is one report by rank 0 and
exit 2 on all ranks, before anything was changed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from configs.errors import ConfigError, Problem
from configs.load import Loaded, from_yaml_text
from parallel.batch import horizon_steps, steps_of
from parallel.layout import Layout
from parallel.runtime import Runtime
from pretrain.checkpoint.allowed_changes import architecture, check_changes, check_data_change, flatten
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.restore import (
    Identity,
    Position,
    choose_checkpoints,
    describe_error,
    random_state,
    restore,
    set_random_state,
    warm_start,
    warm_start_folder,
)
from pretrain.checkpoint.rollback import begin_rollback, finish_rollback, read_policy
from pretrain.checkpoint.saving import Common, Saver
from pretrain.checkpoint.write import remove_leftovers
from pretrain.data.streams import data_identity
from pretrain.data.tokenizer import Tokenizer, load_tokenizer, vocab_size
from pretrain.divergence import Policy, Refused
from pretrain.engine.base import Engine
from pretrain.loop import Ended
from pretrain.metrics.console import make_console
from pretrain.metrics.sinks import NullSink, RecordSink, Sink, Sinks
from pretrain.metrics.summary import make_summary, summary
from pretrain.metrics.wandb_sink import make_wandb_sink, wandb_place
from pretrain.rank.consensus import lead, refuse
from pretrain.run.attempt import Attempt, open_attempt
from pretrain.run.event_log import sync_events
from pretrain.run.events import EventKind
from pretrain.run.files import storage_problem
from pretrain.run.folder import EXIT_CODE, Outcome, RunFolder, finished_text, folder_of
from pretrain.run.provenance import make_provenance
from pretrain.run.record import Record, encode_row


@dataclass(frozen=True)
class _Begun:
    """What rank 0 tells the others about the attempt."""

    finished_at: int | None
    attempt: int
    folders: list[Path]
    warm_folder: Path | None
    # Samples that a rollback passed over, and all before: no step reads them again.
    passed_samples: int = 0


class Session:
    """Built on all ranks after the preflight; a context manager that leaves an outcome behind, whatever happens."""

    def __init__(self, loaded: Loaded, runtime: Runtime) -> None:
        self.loaded, self.config, self.runtime = loaded, loaded.config, runtime
        self.folder: RunFolder = folder_of(self.config)
        self.tokenizer: Tokenizer = load_tokenizer(self.config.data.tokenizer)
        self.vocab_size = vocab_size(self.config, self.tokenizer)
        self.stop_step = steps_of(self.config)
        self.horizon_steps = horizon_steps(self.config)
        self.attempt: Attempt | None = None
        self.sink: Sink = NullSink()
        self.record: Record | None = None
        self.saver: Saver | None = None
        # Rank 0 alone reads it: hashing the whole index of large data takes a while.
        self._data_identity: dict[str, Any] | None = None
        self._started = Position()
        # Generators as this attempt seeded them: what a checkpoint of another world size leaves as they are.
        self._seeded: dict[str, torch.Tensor] = {}
        self._ended = False
        self._begun = lead(self._begin)

    @property
    def is_finished(self) -> bool:
        """The run was done before this attempt: nothing is started, nothing was changed."""
        return self._begun.finished_at is not None

    # Beginning, on rank 0.

    def _begin(self) -> _Begun:
        done = self.folder.done_step()
        if done is not None and done >= self.stop_step:
            print(finished_text(self.folder, self.stop_step))
            return _Begun(done, 0, [], None)
        self.attempt = open_attempt(
            self.folder, self.loaded.text, make_provenance(self.loaded.origin), os.environ, self._may_go_on
        )
        try:
            remove_leftovers(self.folder.checkpoints)
            section, say = self.config.checkpoint, self.say
            passed_samples = finish_rollback(self.folder, say)
            folders = choose_checkpoints(section, self.folder.checkpoints, self._identity(), say)
            data = self._data_identity = data_identity(self.config)
            if folders:
                refuse(check_data_change(read_manifest(folders[0]).data, data, self.config))
            warm = None if folders else warm_start_folder(section, self._identity())
            return _Begun(None, self.attempt.number, folders, warm, passed_samples)
        except ConfigError as error:
            self._finish(Ended("failed", error.problems[0].rule, Position()))
            raise

    def _identity(self) -> Identity:
        return Identity(architecture(self.config.model, self.vocab_size), self.tokenizer.identity())

    def _may_go_on(self, before: str | None) -> list[Problem]:
        """The resume table, against the config of the attempt before; it binds once there is something to go on from."""
        if before is None or not any(self.folder.checkpoints.glob("step_*")):
            return []
        return check_changes(flatten(from_yaml_text(before)), self.config)

    def say(self, kind: EventKind, **fields: Any) -> None:
        """Loud, on rank 0: an event, on the disk when this returns, and a line for people."""
        if self.attempt is None:
            return
        self.attempt.event(kind, **encode_row(fields))
        try:
            sync_events(self.folder)
        except OSError as error:
            raise ConfigError(storage_problem("run.dir", self.folder.events, error)) from error
        words = ", ".join(f"{key} {value}" for key, value in fields.items())
        print(f"phalanx: {kind.replace('_', ' ')}: {words}", file=sys.stderr, flush=True)

    # Going on, on all ranks.

    def restore(self, engine: Engine) -> Position:
        """Fill the engine from where the run stopped, or from the warm start's weights; step 0 keeps the initial weights."""
        asked = self.config.checkpoint.resume_step is not None
        self._seeded = random_state()
        found = restore(self._begun.folders, engine, asked, self.say)
        if found is not None:
            self._started, manifest = found
            if self.config.schedule.horizon_steps is None and manifest.horizon_steps:
                self.horizon_steps = manifest.horizon_steps
            samples = max(self._started.consumed_samples, self._begun.passed_samples)
            fields = {"step": self._started.step, "consumed_samples": samples}
            self._tell(EventKind.RESUMED, **fields, layout=manifest.layout, engine=manifest.engine)
        elif self._begun.warm_folder is not None:
            warm_start(self._begun.warm_folder, engine)
            self._tell(EventKind.WARM_START, folder=str(self._begun.warm_folder))
        samples = max(self._started.consumed_samples, self._begun.passed_samples)
        self._started = replace(self._started, consumed_samples=samples)
        return self._started

    def _tell(self, kind: EventKind, **fields: Any) -> None:
        if self.attempt is not None:
            self.attempt.event(kind, **fields)

    def open_sinks(self) -> Sink:
        """The record, cut back to the restored step, and what copies it. Other ranks write to nothing."""
        if self.attempt is not None:
            self.record = Record.open(self.folder.metrics, self._started.step, self.attempt.event, self._rows_cut)
            sinks: list[Sink] = [RecordSink(self.record)]
            if "console" in self.config.metrics.sinks:
                sinks.append(make_console(self.stop_step, self.config.metrics.log_interval_steps))
            sinks.append(make_wandb_sink(self.config, self.folder, self.attempt.wandb_id, os.environ))
            self.sink = Sinks(sinks)
            if self._started.step:
                self.sink.note(f"resumed at step {self._started.step}")
        return self.sink

    @property
    def _rows_cut(self) -> Path:
        """Where rows go that this attempt cuts from the record."""
        assert self.attempt is not None, "rank 0 holds the attempt"
        return self.attempt.own_dir / "metrics_cut.jsonl"

    def make_saver(self, engine: Engine, layout: Layout) -> Saver:
        common = Common(self.config, self._identity(), self.vocab_size, self._data_identity, self.horizon_steps, layout)
        self.saver = Saver(self.folder.checkpoints, engine, common, self.runtime, self._before_save, self._tell, self.say)
        if self._begun.folders:
            self.saver.last_step = self._started.step
        return self.saver

    def _before_save(self) -> None:
        if self.attempt is not None and self.record is not None:
            self.attempt.check_held()
            # Every row that this checkpoint will claim is on the disk before it.
            self.record.sync()

    # Refused steps.

    def make_policy(self) -> Policy:
        """What judges the steps from here on. Collective, after the record is open: every rank knows the same history."""
        return lead(lambda: read_policy(self.folder, self.config.divergence, self._started.consumed_samples))

    def roll_back(self, engine: Engine, refused: Refused) -> tuple[Position, Policy] | None:
        """Go back to an earlier checkpoint, and past the batches since. Collective. None: there is nothing to go back to."""
        folders = lead(lambda: begin_rollback(self.folder, self.config.divergence, refused, self.say))
        if not folders:
            return None
        set_random_state(self._seeded)
        found = restore(folders, engine, False, self.say)
        assert found is not None, "restore fills the engine or refuses"
        self._started = replace(found[0], consumed_samples=refused.samples)
        if self.attempt is not None and self.record is not None:
            self.record.cut_back(self._started.step, self._rows_cut)
            self.sink.note(f"rolled back to step {self._started.step}")
        return self._started, self.make_policy()

    # Ending.

    def finish(self, ended: Ended) -> int:
        """Write the outcome, close the sinks, print the summary; returns the exit code. All ranks."""
        self._finish(ended)
        if self.attempt is not None:
            place = wandb_place(self.config, self.folder, os.environ)
            checkpoint = self.saver.newest if self.saver else None
            outcome = self._outcome(ended)
            known = make_summary(self.config, self.folder, outcome, ended.position.tokens, self.vocab_size, checkpoint, place)
            print(summary(known), flush=True)
        return EXIT_CODE[ended.state]

    def _finish(self, ended: Ended) -> None:
        if self.attempt is None or self._ended:
            return
        self._ended = True
        outcome = self._outcome(ended)
        try:
            if self.record is not None:
                self.record.sync()
            # First the outcome: closing W&B may take longer than a scheduler waits.
            self.attempt.finish(outcome)
            self.sink.close(outcome)
        finally:
            self.attempt.close()

    def _outcome(self, ended: Ended) -> Outcome:
        assert self.attempt is not None, "rank 0 holds the attempt"
        position = ended.position
        return Outcome(self.attempt.number, ended.state, ended.why, position.step, position.consumed_samples)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self._ended and self.attempt is not None:
            self._finish(Ended("failed", describe_error(error), self._started))
