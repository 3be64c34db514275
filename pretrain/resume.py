"""Filling the engine at the start of an attempt. In: an open session and an engine. Out: `Restored`, on all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from parallel.batch import horizon_steps
from pretrain.checkpoint.going_back import go_back
from pretrain.checkpoint.random_state import random_state
from pretrain.checkpoint.restore import TrainingPosition, restore, warm_start
from pretrain.engine.base import Engine
from pretrain.rank.rank_zero import run_on_rank_0
from pretrain.run.events import EventKind
from pretrain.session import Session


@dataclass(frozen=True)
class Restored:
    """An engine that holds the state of `position`.

    `checkpoint_step`: the step of the checkpoint that was loaded; None: the run starts at step 0. `horizon_steps`: the length
    of the learning-rate schedule. `seeded`: this rank's generators as the attempt seeded them, uint8 by name. A checkpoint
    of another layout leaves the generators in this state.
    """

    position: TrainingPosition
    checkpoint_step: int | None
    horizon_steps: int
    seeded: dict[str, torch.Tensor]


def restore_engine(session: Session, engine: Engine) -> Restored:
    """Load the newest whole checkpoint of the run, else the weights of the warm start, else keep the initial weights.

    Collective. A damaged checkpoint that the config asked for ends all ranks with exit 2.
    """
    config, start, journal = session.context.config, session.start, session.journal
    seeded, horizon = random_state(), horizon_steps(config)
    back_to_step = start.back_to_step
    found = restore(start.checkpoints, engine, config.optimizer, back_to_step is not None, journal.announce)
    position = found[0] if found is not None else TrainingPosition()
    position = replace(position, consumed_samples=max(position.consumed_samples, start.passed_samples))
    checkpoint_step = None
    if found is not None:
        manifest, folder = found[1], session.context.folder
        if back_to_step is not None:
            run_on_rank_0(lambda: go_back(folder, back_to_step, manifest.consumed_samples, journal.announce))
        checkpoint_step = position.step
        if config.schedule.horizon_steps is None and manifest.horizon_steps:
            horizon = manifest.horizon_steps
        place = {"step": position.step, "consumed_samples": position.consumed_samples}
        journal.write_event(EventKind.RESUMED, **place, layout=manifest.layout, engine=manifest.engine)
    elif start.warm_start is not None:
        warm_start(start.warm_start, engine)
        journal.write_event(EventKind.WARM_START, folder=str(start.warm_start))
    session.ending.restored_position = position
    return Restored(position, checkpoint_step, horizon, seeded)
