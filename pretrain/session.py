"""One attempt of a run on all ranks: from taking the run folder to the outcome.

Each step takes what the step before it returned, so that no other order passes the type checker:

    make_context → open_session → restore_engine (pretrain/resume.py) → open_records (pretrain/records.py)
                 → DivergenceGuard (pretrain/divergence_guard.py) and Saver → train (pretrain/loop.py) → Session.finish

Rank 0 alone reads and writes the run folder, and broadcasts what the other ranks need. A refusal is one report by rank 0
and exit 2 on all ranks, before anything was changed.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import Loaded, from_yaml_text
from configs.schema import Config
from parallel.batch import steps_of
from parallel.runtime import Runtime
from pretrain.checkpoint.after_save import AfterSave
from pretrain.checkpoint.allowed_changes import architecture, check_changes, check_data_change, flatten
from pretrain.checkpoint.going_back import check_target, finish_going_back
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.named import Identity, warm_start_folder
from pretrain.checkpoint.restore import TrainingPosition, choose_checkpoints
from pretrain.checkpoint.rollback import finish_rollback
from pretrain.checkpoint.write import remove_leftovers
from pretrain.data.streams import data_identity
from pretrain.data.tokenizer import TextTokenizer, load_tokenizer, vocab_size
from pretrain.ending import AttemptEnding, TrainingEnd
from pretrain.metrics.summary import make_summary, summary
from pretrain.metrics.wandb_sink import wandb_place
from pretrain.rank.process_setup import record_failure
from pretrain.rank.rank_zero import raise_problems, run_on_rank_0
from pretrain.run.attempt import Attempt, open_attempt
from pretrain.run.decision import pending_step
from pretrain.run.folder import EXIT_BROKE, EXIT_CODE, RunFolder, finished_text, folder_of
from pretrain.run.journal import Journal
from pretrain.run.provenance import make_provenance


@dataclass(frozen=True)
class RunContext:
    """What every rank derives from the config before the run folder is opened."""

    loaded: Loaded
    runtime: Runtime
    folder: RunFolder
    tokenizer: TextTokenizer
    # The vocabulary of the model, not padded.
    vocab_size: int
    # The last step of the run.
    stop_step: int

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def identity(self) -> Identity:
        """What a checkpoint must agree with to be loaded."""
        allowed = tuple(self.config.checkpoint.allow_change)
        return Identity(architecture(self.config.model, self.vocab_size), self.tokenizer.identity(), allowed)


@dataclass(frozen=True)
class StartPoint:
    """Where the attempt starts, as rank 0 found it: the same on all ranks.

    `checkpoints`: folders of this run to try, best first; empty: the run starts at step 0. `warm_start`: the checkpoint
    whose weights a run at step 0 begins with. `passed_samples`: the samples that the newest rollback skips, counted from the
    first one; no step reads them again. `back_to_step`: the run goes back to this step by decision, once the engine holds it.
    """

    checkpoints: list[Path]
    warm_start: Path | None
    passed_samples: int
    back_to_step: int | None


@dataclass(frozen=True)
class RankZero:
    """What only rank 0 has: the attempt that holds the run folder, and the identity of the data.

    The other ranks don't need the data's identity, which takes a while: it hashes the whole index of large data.
    """

    attempt: Attempt
    data_identity: dict[str, Any]


class Session:
    """An open attempt. A context manager: leaving it by an exception writes the outcome "failed"."""

    def __init__(self, context: RunContext, start: StartPoint, rank_zero: RankZero | None) -> None:
        self.context = context
        self.start = start
        self.rank_zero = rank_zero
        attempt = rank_zero.attempt if rank_zero is not None else None
        self.journal = Journal(attempt)
        self.ending = AttemptEnding(attempt)
        section = context.config.checkpoint
        self.after_save = AfterSave(section.after_save, section.after_save_timeout_s, context.folder, os.environ)
        # Ahead of W&B, whose summary takes what these commands measure.
        self.ending.close_at_end(self.after_save)

    def finish(self, ended: TrainingEnd, newest_checkpoint: Path | None) -> int:
        """Write the outcome, close the records and print the summary. Returns the exit code. Called on all ranks."""
        try:
            ended = self.ending.write(ended)
        except ConfigError as error:
            why = f"{ended.why}; the end of the attempt can't be recorded: {error.problems[0].rule}"
            record_failure(os.environ, "exception", why)
            print(f"phalanx: {why}", file=sys.stderr, flush=True)
            return EXIT_BROKE
        if self.rank_zero is not None:
            context = self.context
            place = wandb_place(context.config, context.folder, os.environ)
            outcome = self.ending.outcome(ended, self.rank_zero.attempt)
            try:
                known = make_summary(
                    context.config, context.folder, outcome, ended.position.tokens, context.vocab_size, newest_checkpoint, place
                )
                print(summary(known), flush=True)
            except OSError as error:
                print(f"phalanx: no summary: {error}", file=sys.stderr, flush=True)
        return EXIT_CODE[ended.state]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            return
        try:
            cause = error.__cause__
            # Where rank 0 refused for all ranks, the error is a SystemExit.
            self.ending.write_failure(cause.problems[0].rule if isinstance(cause, ConfigError) else _one_line(error))
        except ConfigError as refused:
            # The error of the run goes on upwards.
            print(f"phalanx: the failure can't be recorded: {refused.problems[0].rule}", file=sys.stderr, flush=True)


def make_context(loaded: Loaded, runtime: Runtime) -> RunContext:
    """Reads the tokenizer; changes nothing. Called on all ranks, after the preflight."""
    config = loaded.config
    tokenizer = load_tokenizer(config.data.tokenizer)
    return RunContext(loaded, runtime, folder_of(config), tokenizer, vocab_size(config, tokenizer), steps_of(config))


def open_session(context: RunContext) -> Session | None:
    """Begin an attempt. None: the run was finished before, and nothing was changed. Collective."""
    rank_zero: RankZero | None = None

    def begin() -> StartPoint | None:
        nonlocal rank_zero
        done_step = context.folder.done_step()
        going_back = pending_step(context.folder, context.config.checkpoint.resume_step) is not None
        if done_step is not None and done_step >= context.stop_step and not going_back:
            print(finished_text(context.folder, context.stop_step))
            return None
        start, rank_zero = _begin_attempt(context)
        return start

    start = run_on_rank_0(begin)
    return Session(context, start, rank_zero) if start is not None else None


def _begin_attempt(context: RunContext) -> tuple[StartPoint, RankZero]:
    """Take the run folder and find the start point. Rank 0. Raises ConfigError; the outcome is then written."""
    config, folder = context.config, context.folder
    provenance = make_provenance(context.loaded.origin)
    resume_step = config.checkpoint.resume_step

    def problems(before: str | None) -> list[Problem]:
        return _resume_problems(context, before)

    attempt = open_attempt(folder, context.loaded.text, provenance, os.environ, problems, resume_step)
    announce = Journal(attempt).announce
    try:
        remove_leftovers(folder.checkpoints)
        finish_going_back(folder, announce)
        back_to_step = pending_step(folder, resume_step)
        # A decision to go back replaces every rollback before it: the new line reads what follows its checkpoint.
        passed_samples = finish_rollback(folder, announce) if back_to_step is None else 0
        checkpoints = choose_checkpoints(back_to_step, folder.checkpoints, context.identity, announce)
        data = data_identity(config)
        if checkpoints:
            raise_problems(check_data_change(read_manifest(checkpoints[0]).data, data, config))
        warm_start = None if checkpoints else warm_start_folder(config.checkpoint, context.identity)
        return StartPoint(checkpoints, warm_start, passed_samples, back_to_step), RankZero(attempt, data)
    except ConfigError as error:
        AttemptEnding(attempt).write(TrainingEnd("failed", error.problems[0].rule, TrainingPosition()))
        raise


def _resume_problems(context: RunContext, config_before: str | None) -> list[Problem]:
    """What the config of the attempt before forbids to change. No checkpoint exists: everything may change."""
    asked_step = pending_step(context.folder, context.config.checkpoint.resume_step)
    missing = check_target(context.folder, asked_step) if asked_step is not None else []
    if config_before is None or not any(context.folder.checkpoints.glob("step_*")):
        return missing
    return missing + check_changes(flatten(from_yaml_text(config_before)), context.config)


def _one_line(error: BaseException) -> str:
    """The error's type and text, at most 500 characters."""
    return traceback.format_exception_only(error)[-1].strip()[:500]
