"""One attempt of a run on all ranks: who holds the folder, where it goes on, what is written, how it ends.

Rank 0 reads and writes the run folder; what it finds is told to the others. Every refusal is one report by rank 0 and
exit 2 on all ranks, before anything was changed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from configs.errors import ConfigError, Problem
from configs.files import read_json
from configs.load import Loaded, from_yaml_text
from configs.run_folder import EXIT_CODE, Outcome, RunFolder, finished_text, folder_of
from parallel.batch import horizon_steps, steps_of
from parallel.layout import Layout
from parallel.legality import check_config
from parallel.runtime import Runtime, check_device, check_environment
from pretrain.backend import check_backend, detect_machine
from pretrain.checkpoint_write import CheckpointWriter, prune, remove_leftovers
from pretrain.console import make_console
from pretrain.data import data_identity
from pretrain.data_check import check_data, vocab_size
from pretrain.engine.base import MOMENTS, WEIGHT, Engine
from pretrain.loop import Ended, Saver
from pretrain.manifest import FORMAT, Manifest, read_manifest
from pretrain.provenance import make_provenance
from pretrain.record import Record, read_rows
from pretrain.restore import (
    Identity,
    Position,
    choose_checkpoints,
    describe_error,
    random_pieces,
    restore,
    warm_start,
    warm_start_folder,
)
from pretrain.resume import architecture, check_changes, check_data_change, flatten
from pretrain.run_folder import Attempt, open_attempt
from pretrain.sinks import NullSink, RecordSink, Sink, Sinks
from pretrain.summary import RunSummary, summary
from pretrain.together import lead, refuse
from pretrain.tokenizer import Tokenizer, load_tokenizer
from pretrain.wandb_sink import make_wandb_sink, wandb_place


def check_start(loaded: Loaded, runtime: Runtime) -> list[Problem]:
    """Everything that can be known before the first group is made."""
    config = loaded.config
    launch = config.launch
    world = launch.nodes * launch.processes_per_node
    problems = check_environment(os.environ, world, launch.nodes, launch.processes_per_node)
    problems += check_device(config.cluster.device, runtime.device)
    problems += check_backend(config, detect_machine(runtime.is_cuda))
    return [*problems, *check_config(config).problems, *check_data(config)]


@dataclass(frozen=True)
class _Begun:
    """What rank 0 tells the others about the attempt."""

    finished_at: int | None
    attempt: int
    folders: list[Path]
    warm_folder: Path | None


class Session:
    """Built on all ranks after `check_start`; a context manager that leaves an outcome behind, whatever happens."""

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
        self._checkpoint: Path | None = None
        # Rank 0 alone reads it: hashing the whole index of large data takes a while.
        self._data_identity: dict[str, Any] | None = None
        self._started = Position()
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
            section, say = self.config.checkpoint, self._say
            folders = choose_checkpoints(section, self.folder.checkpoints, self._identity(), say)
            data = self._data_identity = data_identity(self.config)
            if folders:
                refuse(check_data_change(read_manifest(folders[0]).data, data, self.config))
            return _Begun(None, self.attempt.number, folders, None if folders else warm_start_folder(section, self._identity()))
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

    def _say(self, kind: str, **fields: Any) -> None:
        """Loud: an event and a line for people."""
        assert self.attempt is not None, "rank 0 holds the attempt"
        self.attempt.event(kind, **fields)
        words = ", ".join(f"{key} {value}" for key, value in fields.items())
        print(f"phalanx: {kind.replace('_', ' ')}: {words}", file=sys.stderr, flush=True)

    # Going on, on all ranks.

    def restore(self, engine: Engine) -> Position:
        """Fill the engine from where the run stopped, or from the warm start's weights; step 0 keeps the initial weights."""
        asked = self.config.checkpoint.resume_step is not None
        say = self._say if self.runtime.rank == 0 else _silent
        found = restore(self._begun.folders, engine, asked, say)
        if found is not None:
            self._started, manifest = found
            if self.config.schedule.horizon_steps is None and manifest.horizon_steps:
                self.horizon_steps = manifest.horizon_steps
            self._tell("resumed", step=self._started.step, layout=manifest.layout, engine=manifest.engine)
        elif self._begun.warm_folder is not None:
            warm_start(self._begun.warm_folder, engine)
            self._tell("warm_start", folder=str(self._begun.warm_folder))
        return self._started

    def _tell(self, kind: str, **fields: Any) -> None:
        if self.attempt is not None:
            self.attempt.event(kind, **fields)

    def open_sinks(self) -> Sink:
        """The record, cut back to the restored step, and what copies it. Other ranks write to nothing."""
        if self.attempt is not None:
            cut = self.attempt.own_dir / "metrics_cut.jsonl"
            self.record = Record.open(self.folder.metrics, self._started.step, self.attempt.event, cut)
            sinks: list[Sink] = [RecordSink(self.record)]
            if "console" in self.config.metrics.sinks:
                sinks.append(make_console(self.stop_step, self.config.metrics.log_interval_steps, os.environ))
            sinks.append(make_wandb_sink(self.config, self.folder, self.attempt.wandb_id, os.environ))
            self.sink = Sinks(sinks)
            if self._started.step:
                self.sink.note(f"resumed at step {self._started.step}")
        return self.sink

    def make_saver(self, engine: Engine, layout: Layout) -> Saver:
        section = self.config.checkpoint
        writer = CheckpointWriter(self.folder.checkpoints, self.runtime.rank, section.asynchronous)
        # Adam's moments come with the first step: each is as large as the weights.
        weights = sum(piece.data.nbytes for piece in engine.owned() if piece.kind == WEIGHT)
        writer.reserve((1 + len(MOMENTS)) * weights)

        def begin(position: Position) -> None:
            if self.attempt is not None and self.record is not None:
                self.attempt.check_held()
                # Every row that this checkpoint will claim is on the disk before it.
                self.record.sync()
            pieces = [*engine.owned(), *random_pieces(self.runtime.rank)]
            writer.start(self._manifest(position, engine, layout, pieces), pieces)

        self.saver = Saver(writer, section.interval_steps, section.save_at_end, begin, self._published)
        if self._begun.folders:
            self.saver.last_step = self._started.step
        return self.saver

    def _manifest(self, position: Position, engine: Engine, layout: Layout, pieces: list[Any]) -> Manifest:
        """Equal on all ranks but for `tensors`, which rank 0 gets from all."""
        tensors = {piece.name: list(piece.global_shape) for piece in pieces if piece.kind == WEIGHT}
        gathered: list[Any] | None = [None] * self.runtime.world_size if self.runtime.rank == 0 else None
        dist.gather_object(tensors, gathered, dst=0)
        merged = {name: shape for part in gathered or [] for name, shape in part.items()}
        return Manifest(
            format=FORMAT,
            step=position.step,
            consumed_samples=position.consumed_samples,
            tokens=position.tokens,
            optimizer_steps=engine.optimizer_steps(),
            horizon_steps=self.horizon_steps,
            engine=engine.name,
            zero_stage=engine.zero_stage,
            layout=layout.degrees(),
            model=architecture(self.config.model, self.vocab_size),
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer.identity(),
            data=self._data_identity,
            config=asdict(self.config),
            kinds=(WEIGHT, *MOMENTS, "rng"),
            tensors={name: {"shape": shape, "dtype": "F32"} for name, shape in sorted(merged.items())},
            files={},
            world_size=self.runtime.world_size,
        )

    def _published(self, folder: Path, error: str | None) -> None:
        """A save is complete, or has failed and left nothing. The record is on the disk before the next one may rely on it."""
        if self.attempt is None:
            return
        if error is not None:
            self._say("save_failed", folder=folder.name, why=error)
            return
        self._checkpoint = folder
        self.attempt.event("saved", step=int(folder.name.split("_")[1]), folder=folder.name)
        section = self.config.checkpoint
        for gone in prune(self.folder.checkpoints, section.keep, section.milestone_interval_steps):
            self.attempt.event("pruned", folder=gone.name)

    # Ending.

    def finish(self, ended: Ended) -> int:
        """Write the outcome, close the sinks, print the summary; returns the exit code. All ranks."""
        self._finish(ended)
        if self.attempt is not None:
            print(summary(self._summary(ended)), flush=True)
        return EXIT_CODE[ended.state]

    def _finish(self, ended: Ended) -> None:
        if self.attempt is None or self._ended:
            return
        self._ended = True
        position = ended.position
        outcome = Outcome(self.attempt.number, ended.state, ended.why, position.step, position.consumed_samples)
        try:
            if self.record is not None:
                self.record.sync()
            # First the outcome: closing W&B may take longer than a scheduler waits.
            self.attempt.finish(outcome)
            self.sink.close(outcome)
        finally:
            self.attempt.close()

    def _summary(self, ended: Ended) -> RunSummary:
        rows = list(read_rows(self.folder.metrics))
        speeds = sorted(row["tokens_per_s"] for row in rows if row.get("tokens_per_s"))
        validated = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
        part = self.config.data.train[0].path
        meta = read_json(Path(f"{part}.meta.json"))
        return RunSummary(
            outcome=Outcome(self._begun.attempt, ended.state, ended.why, ended.position.step, ended.position.consumed_samples),
            folder=self.folder,
            total_steps=self.stop_step,
            first_loss=rows[0]["loss"] if rows else None,
            last_loss=rows[-1]["loss"] if rows else None,
            vocab_size=self.vocab_size,
            unigram_entropy=meta.get("unigram_entropy_nats") if isinstance(meta, dict) else None,
            val_loss=validated[-1] if validated else None,
            tokens=ended.position.tokens,
            tokens_per_s=speeds[len(speeds) // 2] if speeds else None,
            wall_s=sum(row.get("step_time_s") or 0.0 for row in rows) or None,
            checkpoint=str(self._checkpoint) if self._checkpoint else None,
            wandb_place=wandb_place(self.config, self.folder, os.environ),
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self._ended and self.attempt is not None:
            self._finish(Ended("failed", describe_error(error), self._started))


def _silent(kind: str, **fields: Any) -> None:
    return
