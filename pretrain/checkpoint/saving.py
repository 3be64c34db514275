"""The saves of a running attempt: when they are due, their manifests, and the deletion of old checkpoints after each.

In: the engine, the values that all manifests of this attempt share, and the functions that report. Out: folders under
checkpoints/. `save` and `settle` are collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.schema import Config
from parallel.layout import Layout
from parallel.runtime import Runtime
from pretrain.checkpoint.manifest import FORMAT, Manifest
from pretrain.checkpoint.random_state import random_state_slices
from pretrain.checkpoint.restore import Identity, TrainingPosition
from pretrain.checkpoint.rollback import drop_passed, step_of
from pretrain.checkpoint.write import CheckpointWriter, prune
from pretrain.engine.base import MOMENTS, MOMENTUM, WEIGHT, Engine, StateSlice, state_kinds
from pretrain.run.events import EventKind


@dataclass(frozen=True)
class Common:
    """The values that all manifests of an attempt share. Only rank 0, which writes the manifests, has `data`."""

    config: Config
    identity: Identity
    vocab_size: int
    data: dict[str, Any] | None
    horizon_steps: int
    layout: Layout

    def manifest(self, position: TrainingPosition, engine: Engine, tensors: dict[str, list[int]], world_size: int) -> Manifest:
        return Manifest(
            format=FORMAT,
            step=position.step,
            consumed_samples=position.consumed_samples,
            tokens=position.tokens,
            optimizer_steps=engine.optimizer_steps(),
            horizon_steps=self.horizon_steps,
            engine=engine.name,
            zero_stage=engine.zero_stage,
            layout=self.layout.degrees(),
            model=self.identity.model,
            vocab_size=self.vocab_size,
            tokenizer=self.identity.tokenizer,
            data=self.data,
            config=asdict(self.config),
            kinds=(WEIGHT, *MOMENTS, *((MOMENTUM,) if self.config.optimizer.kind == "muon" else ()), "rng"),
            tensors={name: {"shape": shape, "dtype": "F32"} for name, shape in sorted(tensors.items())},
            files={},
            world_size=world_size,
        )


class Saver:
    """Saves one engine's state.

    `before_save` runs on every rank ahead of a save; on rank 0 it may return why the disk refuses the rows that the checkpoint
    would count. `write_event` and `announce` report on rank 0, and `after_save` is told each complete checkpoint there. A save
    that fails is told, and the next one that is due tries again.
    """

    def __init__(
        self,
        checkpoints: Path,
        engine: Engine,
        common: Common,
        runtime: Runtime,
        before_save: Callable[[], str | None],
        write_event: Callable[..., None],
        announce: Callable[..., None],
        after_save: Callable[[Path, int], None],
    ) -> None:
        self._checkpoints, self._engine, self._common, self._runtime = checkpoints, engine, common, runtime
        self._before_save, self._write_event, self._announce = before_save, write_event, announce
        self._after_save = after_save
        self._section = common.config.checkpoint
        self.writer = CheckpointWriter(checkpoints, runtime.rank, self._section.asynchronous)
        # Adam's moments exist from the first step on. Each kind of state is as large as the weights.
        self.writer.reserve(
            sum(
                state_slice.data.nbytes
                * (1 + len(state_kinds(state_slice.name, state_slice.global_shape, common.config.optimizer)))
                for state_slice in engine.owned_state()
                if state_slice.kind == WEIGHT
            )
        )
        self.last_step = -1
        self._began_s = self._blocked_s = 0.0
        self.error: str | None = None
        # The last complete checkpoint; known on rank 0 only.
        self.newest: Path | None = None

    def is_due(self, step: int) -> bool:
        return bool(self._section.interval_steps and step % self._section.interval_steps == 0)

    @property
    def at_end(self) -> bool:
        return self._section.save_at_end

    def save(self, position: TrainingPosition) -> None:
        """Start a save of this position, after the save under way is complete. A position is saved once, unless that failed."""
        self.settle()
        if self.last_step == position.step:
            return
        self._began_s = time.monotonic()
        refusal = self._before_save()
        state_slices = [*self._engine.owned_state(), *random_state_slices(self._runtime.rank)]
        self.writer.start(
            self._common.manifest(position, self._engine, self._tensors(state_slices), self._runtime.world_size),
            state_slices,
            refusal,
        )
        self._blocked_s = time.monotonic() - self._began_s
        self.last_step = position.step
        if not self.writer.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way, if there is one, and complete it on all ranks."""
        if self.writer.status is not None:
            began_s = time.monotonic()
            folder, self.error = self.writer.finish()
            self._blocked_s += time.monotonic() - began_s
            if self.error is not None:
                self.last_step = -1
            if self._runtime.rank == 0:
                self._published(folder, self.error)

    def _tensors(self, state_slices: list[StateSlice]) -> dict[str, list[int]]:
        """The shapes of all weights of the model by name on rank 0; empty on other ranks."""
        mine = {state_slice.name: list(state_slice.global_shape) for state_slice in state_slices if state_slice.kind == WEIGHT}
        gathered: list[Any] | None = [None] * self._runtime.world_size if self._runtime.rank == 0 else None
        dist.gather_object(mine, gathered, dst=0)
        return {name: shape for part in gathered or [] for name, shape in part.items()}

    def _published(self, folder: Path, error: str | None) -> None:
        """Report that a save is complete, or that it failed and left no files. After a complete save, delete old checkpoints.

        Rank 0 only.
        """
        blocked_s = round(self._blocked_s, 3)
        if error is not None:
            self._announce(EventKind.SAVE_FAILED, folder=folder.name, why=error, blocked_s=blocked_s)
            return
        self.newest = folder
        step = step_of(folder)
        # Includes the steps until the loop noticed that the files were written. A save before a time limit takes at most this.
        seconds = round(time.monotonic() - self._began_s, 3)
        self._write_event(EventKind.SAVED, step=step, folder=folder.name, seconds=seconds, blocked_s=blocked_s)
        self._after_save(folder, step)
        section = self._section
        try:
            for path in prune(self._checkpoints, section.keep, section.milestone_interval_steps):
                self._write_event(EventKind.PRUNED, folder=path.name)
            if section.keep:
                for path in drop_passed(self._checkpoints, step, section.milestone_interval_steps):
                    self._write_event(EventKind.PRUNED, folder=path.name)
        except OSError as refused:
            self._announce(EventKind.PRUNE_FAILED, why=str(refused))
