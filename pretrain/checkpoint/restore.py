"""Loading a checkpoint at a start: the newest undamaged checkpoint of the run, or the weights of a warm start.

In: the folder of checkpoints, and the model and tokenizer that a checkpoint must match. Out: the `TrainingPosition` at which the
run continues, with the engine filled. Rank 0 chooses the folder, and every rank reads its own slices. The ranks exchange the
damage that each has found before any of them continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from configs.errors import ConfigError, Problem
from configs.optimizer_schema import Optimizer
from pretrain.checkpoint.allowed_changes import has_same_optimizer
from pretrain.checkpoint.manifest import Manifest, check_identity, read_manifest, unfit_problem
from pretrain.checkpoint.named import Identity, all_damaged, require
from pretrain.checkpoint.random_state import read_random_state, set_random_state
from pretrain.checkpoint.read import CheckpointReader
from pretrain.checkpoint.rollback import move_aside
from pretrain.checkpoint.tensor_file import DamagedFile, UnfitFile
from pretrain.engine.base import MOMENTS, WEIGHT, Engine, StateSlice
from pretrain.rank.rank_zero import raise_problems, run_on_rank_0
from pretrain.run.events import EventKind
from pretrain.run.folder import complete_checkpoints, step_folder

Announce = Callable[..., None]


@dataclass(frozen=True)
class TrainingPosition:
    """The progress of a run. Samples and tokens are counted over all ranks since the run began."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0


def choose_checkpoints(asked_step: int | None, checkpoints: Path, identity: Identity, announce: Announce) -> list[Path]:
    """The checkpoints to try, best first; empty: the run starts at step 0. `asked_step`: the only step to try.

    Rank 0 only. Reads manifests only. Raises ConfigError when the asked step is missing or damaged, when a checkpoint has another
    model or was written by another version, or when all checkpoints are damaged.
    """
    if asked_step is not None:
        folder = step_folder(checkpoints, asked_step)
        require(folder, "checkpoint.resume_step", asked_step, identity)
        return [folder]
    found = [folder for _, folder in complete_checkpoints(checkpoints)]
    whole = []
    for folder in found:
        try:
            manifest = read_manifest(folder)
        except UnfitFile as unfit:
            raise ConfigError(unfit_problem(folder, unfit)) from unfit
        except DamagedFile as damage:
            pass_over(folder, damage, announce)
            continue
        if problems := check_identity(manifest, folder, identity.model, identity.tokenizer, identity.allowed):
            raise ConfigError(problems)
        whole.append(folder)
    if found and not whole:
        raise ConfigError(all_damaged(checkpoints))
    return whole


def pass_over(folder: Path, damage: DamagedFile, announce: Announce) -> None:
    """Announce that a checkpoint is damaged, and rename its folder so that no attempt loads it again. Rank 0."""
    aside = move_aside(folder, "damaged")
    announce(EventKind.CHECKPOINT_DAMAGED, folder=folder.name, why=str(damage), kept_as=aside.name)


def restore(
    folders: list[Path], engine: Engine, optimizer: Optimizer, asked_for: bool, announce: Announce
) -> tuple[TrainingPosition, Manifest] | None:
    """Fill the engine from the first undamaged folder. Returns (position, manifest); None without folders. Collective.

    `folders`: best first, equal on all ranks. Where `optimizer` is not the one that wrote a checkpoint, it starts afresh.
    """
    for folder in folders:
        fresh: str | None = None
        try:
            reader = CheckpointReader(folder)
            fresh = _why_fresh(reader, optimizer)
            reader.fill(engine.local_state(True) if fresh is None else _fresh_state(engine))
            states = read_random_state(reader)
            damage = None
        except DamagedFile as raised:
            damage = raised
        worst = _worst_damage(damage)
        if worst is None:
            manifest = reader.manifest  # type: ignore[possibly-unbound]
            engine.loaded(manifest.optimizer_steps if fresh is None else 0)  # type: ignore[possibly-unbound]
            set_random_state(states)  # type: ignore[possibly-unbound]
            if fresh is not None:
                run_on_rank_0(partial(announce, EventKind.OPTIMIZER_RESET, folder=folder.name, why=fresh))
            return TrainingPosition(manifest.step, manifest.consumed_samples, manifest.tokens), manifest
        if _is_unfit_anywhere(damage):
            run_on_rank_0(partial(raise_problems, [unfit_problem(folder, worst)]))
        if asked_for:
            problem = Problem("checkpoint.resume_step", folder.name, f"must be whole: {worst}", "name another step")
            run_on_rank_0(partial(raise_problems, [problem]))
        run_on_rank_0(partial(pass_over, folder, DamagedFile(worst), announce))
    if folders:
        run_on_rank_0(partial(raise_problems, [all_damaged(folders[0].parent)]))
    return None


def _why_fresh(reader: CheckpointReader, optimizer: Optimizer) -> str | None:
    """Why a checkpoint's optimizer state is not loaded; None: it is."""
    if not all(reader.has(kind) for kind in MOMENTS):
        return "the checkpoint has weights only"
    if not has_same_optimizer(reader.manifest.config, optimizer):
        return f"another optimizer wrote its state (optimizer.kind is {optimizer.kind} now)"
    return None


def _fresh_state(engine: Engine) -> Iterator[StateSlice]:
    """The slices of the weights; the optimizer state is set to zero."""
    for state_slice in engine.local_state(True):
        if state_slice.kind == WEIGHT:
            yield state_slice
        else:
            state_slice.data.zero_()


def _is_unfit_anywhere(damage: DamagedFile | None) -> bool:
    """Whether any rank found a checkpoint whole but unfit. Collective."""
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, isinstance(damage, UnfitFile))
    return any(found)


def warm_start(folder: Path, engine: Engine) -> None:
    """Load the weights only, for a run with a fresh optimizer. Collective. A damaged checkpoint ends all ranks."""
    damage = None
    try:
        CheckpointReader(folder).fill(engine.local_state(with_optimizer=False))
    except DamagedFile as raised:
        damage = raised
    if worst := _worst_damage(damage):
        problem = Problem("checkpoint.load", str(folder), f"must be whole: {worst}", "name another checkpoint")
        run_on_rank_0(partial(raise_problems, [problem]))
    engine.loaded(None)


def _worst_damage(damage: DamagedFile | None) -> str | None:
    """The error text of the first rank that found damage, on all ranks; None: no rank found any."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(damage) if damage else None)
    return next((text for text in texts if text), None)
