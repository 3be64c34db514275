"""Going back by decision: `checkpoint.resume_step` names an earlier checkpoint, and the run goes on from there as another line.

The decision is taken once and is an event, `went_back` {from_step, to_step, checkpoints, …}. It is written when the engine holds
the checkpoint's state, so a checkpoint that turns out to be damaged changes nothing. From then on the checkpoints that it lists
are of the line that was left: they end in .rolled_back like those of a rollback (pretrain/checkpoint/rollback.py), nobody
resumes from them, and they are deleted only when a save of the new line has passed their step.

Started again with the same `resume_step`, as a scheduler does after a preemption, the run goes on from the newest checkpoint of
the new line. To go back to the same step once more, one attempt without `resume_step` must lie between.

W&B can't take rows back: the new line gets a W&B run of its own, which begins with the record's rows up to `to_step`.

Torch-free.
"""

from __future__ import annotations

import secrets
from typing import Any

from configs.errors import Problem
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.rollback import ASIDE, Announce, move_aside
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.run.decision import events_of
from pretrain.run.events import EventKind
from pretrain.run.files import write_atomically
from pretrain.run.folder import RunFolder, complete_checkpoints, step_folder


def _newest_decision(folder: RunFolder) -> tuple[dict[str, Any] | None, set[str]]:
    """The newest decision to go back, and the checkpoints that were set aside since."""
    decision, done = None, set()
    for event in events_of(folder):
        if event.get("kind") == EventKind.WENT_BACK:
            decision, done = event, set()
        elif event.get("kind") == EventKind.CHECKPOINT_ROLLED_BACK:
            done.add(event["folder"])
    return decision, done


def check_target(folder: RunFolder, step: int) -> list[Problem]:
    """Is there a complete checkpoint of this step to go back to? Reads its manifest only."""
    target = step_folder(folder.checkpoints, step)
    try:
        read_manifest(target)
    except DamagedFile as damage:
        steps = ", ".join(str(one) for one, _ in complete_checkpoints(folder.checkpoints)) or "none"
        fix = f"complete ones beside it: steps {steps}"
        if aside := sorted(path.name for path in folder.checkpoints.glob(f"{target.name}.{ASIDE}*")):
            fix += f"; the run went back behind {', '.join(aside)}"
        why = str(damage) if target.exists() else "there is none of this step"
        return [Problem("checkpoint.resume_step", step, f"must be a complete checkpoint: {why}", fix)]
    return []


def newer_checkpoints(folder: RunFolder, step: int) -> list[int]:
    """Steps of the complete checkpoints that going back to `step` sets aside, ascending."""
    return sorted(one for one, _ in complete_checkpoints(folder.checkpoints) if one > step)


def go_back(folder: RunFolder, step: int, consumed_samples: int, announce: Announce) -> None:
    """Take the decision and carry it out. Rank 0, when the engine holds the state of `step`, before the record is opened."""
    newer = newer_checkpoints(folder, step)
    announce(
        EventKind.WENT_BACK,
        from_step=max([step, *newer]),
        to_step=step,
        consumed_samples=consumed_samples,
        checkpoints=[step_folder(folder.checkpoints, one).name for one in newer],
        wandb_id=secrets.token_hex(4),
    )
    finish_going_back(folder, announce)


def finish_going_back(folder: RunFolder, announce: Announce) -> None:
    """Carry out what is left of the newest decision: all of it, or what a kill left undone. Rank 0, before any step is made.

    No step is made before this is done, so a listed checkpoint without its event is of the line that was left.
    """
    event, done = _newest_decision(folder)
    if event is None:
        return
    for name in event["checkpoints"]:
        if name in done:
            continue
        path = folder.checkpoints / name
        # A kill may have come between the new name and its event.
        kept_as = move_aside(path, ASIDE).name if path.exists() else f"{name}.{ASIDE}"
        announce(EventKind.CHECKPOINT_ROLLED_BACK, folder=name, kept_as=kept_as)
    if folder.wandb_id.read_text().strip() != event["wandb_id"]:
        # What W&B has is of the line that was left.
        (folder.wandb / "cursor.json").unlink(missing_ok=True)
        write_atomically(folder.wandb_id, event["wandb_id"] + "\n")
