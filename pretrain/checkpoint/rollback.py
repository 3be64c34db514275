"""Returning a run to an earlier checkpoint. In: the run folder's events and checkpoints. Out: checkpoints to load. Rank 0.

A run goes back when a step diverges, which this module handles, or when `checkpoint.resume_step` asks for it
(pretrain/checkpoint/going_back.py).

A rollback first writes its event, `rolled_back` {from_step, to_step, consumed_samples, …}, to the disk. From then on the run is
at `to_step`, and `consumed_samples` includes the refused batch. Checkpoints that were saved after the event have consumed more
samples than that, and those before it have not. The next start can therefore finish a rollback that a kill interrupted. The
folders of the checkpoints after `to_step` end in .rolled_back until a save has passed their step.

Torch-free.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Divergence
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.divergence import DivergencePolicy, RefusedStep, read_history
from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.files import sync_folder
from pretrain.run.folder import RunFolder, complete_checkpoints
from pretrain.run.record_rows import rows_from_end

ASIDE = "rolled_back"

# announce(kind, **fields) writes an event to the disk and prints a line.
Announce = Callable[..., None]


@dataclass(frozen=True)
class Rollback:
    """The newest return to an earlier checkpoint. No later step may read the first `consumed_samples` samples again.

    `is_asked_for`: `checkpoint.resume_step` asked for it; otherwise a refused step caused it.
    """

    to_step: int
    consumed_samples: int
    is_asked_for: bool = False


def newest_rollback(events: Iterable[dict[str, Any]]) -> Rollback | None:
    """The newest return to an earlier checkpoint in the events; None: the run never went back."""
    kinds = (EventKind.ROLLED_BACK, EventKind.WENT_BACK)
    found = [event for event in events if event.get("kind") in kinds]
    if not found:
        return None
    return Rollback(found[-1]["to_step"], found[-1]["consumed_samples"], found[-1]["kind"] == EventKind.WENT_BACK)


def choose_targets(checkpoints: Path, at_step: int, back: int, before: Rollback | None) -> list[Path]:
    """Complete checkpoints of `at_step` or an earlier step, best first; empty: there is none.

    `back`: how many checkpoints to go back; 1 is the newest. When no checkpoint was saved since the rollback `before`, that
    rollback did not go back far enough. The choice then begins at least one checkpoint further back, if there is one.
    """
    found = [(step, folder) for step, folder in complete_checkpoints(checkpoints) if step <= at_step]
    if not found:
        return []
    again = before is not None and not before.is_asked_for and found[0][0] <= before.to_step
    index = max(back - 1, 1) if again else back - 1
    return [folder for _, folder in found[min(index, len(found) - 1) :]]


def set_newer_aside(checkpoints: Path, rollback: Rollback, announce: Announce) -> None:
    """Rename the checkpoints that were saved after the rollback's step and before its event, so that no attempt loads them."""
    for step, folder in complete_checkpoints(checkpoints):
        if step <= rollback.to_step:
            continue
        try:
            consumed_samples = read_manifest(folder).consumed_samples
        except DamagedFile:
            # It is unknown whether it was saved before or after the event. choose_checkpoints skips it as damaged.
            continue
        if consumed_samples <= rollback.consumed_samples:
            announce(EventKind.CHECKPOINT_ROLLED_BACK, folder=folder.name, kept_as=move_aside(folder, ASIDE).name)


def read_policy(folder: RunFolder, section: Divergence, consumed_samples: int) -> DivergencePolicy:
    """The divergence policy with the run's history. Rank 0 calls it after the record was cut back to the run's newest step."""
    rows = rows_from_end(folder.metrics) if folder.metrics.exists() else ()
    return DivergencePolicy(section, read_history(section, rows, read_events(folder), consumed_samples))


def begin_rollback(folder: RunFolder, section: Divergence, refused: RefusedStep, announce: Announce) -> list[Path]:
    """Write the event of a rollback and set newer checkpoints aside. Returns the checkpoints to load, best first.

    Empty: there is no checkpoint, and nothing was changed. Once the event is written, the run is at the step of the first
    returned checkpoint, even if a kill follows.
    """
    before = newest_rollback(read_events(folder))
    folders = choose_targets(folder.checkpoints, refused.step - 1, section.rollback_checkpoints, before)
    if folders:
        rollback = Rollback(step_of(folders[0]), refused.samples)
        numbers = {"loss": refused.loss, "grad_norm": refused.grad_norm, "rule": refused.rule}
        place = {"to_step": rollback.to_step, "consumed_samples": rollback.consumed_samples}
        announce(EventKind.ROLLED_BACK, from_step=refused.step, **place, **numbers)
        set_newer_aside(folder.checkpoints, rollback, announce)
    return folders


def finish_rollback(folder: RunFolder, announce: Announce) -> int:
    """Finish the newest rollback if a kill interrupted it. Called at a start.

    Returns the number of leading samples that no step may read again; 0: the run never went back.
    """
    rollback = newest_rollback(read_events(folder))
    if rollback is None:
        return 0
    if not rollback.is_asked_for:
        set_newer_aside(folder.checkpoints, rollback, announce)
    return rollback.consumed_samples


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder, whether or not the folder was renamed."""
    return int(folder.name.split(".")[0].removeprefix("step_"))


def move_aside(folder: Path, suffix: str) -> Path:
    """Rename a checkpoint's folder so that it is no longer taken for a checkpoint. Returns the new path. Raises OSError."""
    aside = folder.with_name(f"{folder.name}.{suffix}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{suffix}{number}")
    folder.rename(aside)
    sync_folder(folder.parent)
    return aside


def drop_passed(checkpoints: Path, saved_step: int, milestone_interval: int | None) -> Iterator[Path]:
    """Delete the renamed checkpoints of `saved_step` and before, except milestones. Yields each deleted one. Raises OSError."""
    for folder in sorted(checkpoints.glob(f"step_*.{ASIDE}*")):
        step = step_of(folder)
        if step <= saved_step and not (milestone_interval and step % milestone_interval == 0):
            shutil.rmtree(folder)
            yield folder
