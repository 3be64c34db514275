"""Returning to the checkpoint that `checkpoint.resume_step` names. The run continues from it as a new branch.

The return happens once and is an event, `went_back` {from_step, to_step, checkpoints, …}. It is written when the engine has
loaded the checkpoint, so a damaged checkpoint changes nothing. The event lists the checkpoints of the old branch. Their folders
end in .rolled_back, like those of a rollback (pretrain/checkpoint/rollback.py). No attempt resumes from them, and they are
deleted only when a save of the new branch has passed their step.

A scheduler may start the run again with the same `resume_step` after a preemption. The run then continues from the newest
checkpoint of the new branch. To return to the same step once more, start one attempt without `resume_step` first.

W&B can't delete rows. The new branch therefore gets a W&B run of its own, which begins with the record's rows up to `to_step`.

Torch-free.
"""

from __future__ import annotations

import secrets
from typing import Any

from configs.errors import Problem
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.rollback import ASIDE, Announce, move_aside
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.files import write_atomically
from pretrain.run.folder import RunFolder, complete_checkpoints, step_folder


def _newest_decision(folder: RunFolder) -> tuple[dict[str, Any] | None, set[str]]:
    """(the newest `went_back` event or None, names of the checkpoints that were set aside after it)."""
    decision, done = None, set()
    for event in read_events(folder):
        if event.get("kind") == EventKind.WENT_BACK:
            decision, done = event, set()
        elif event.get("kind") == EventKind.CHECKPOINT_ROLLED_BACK:
            done.add(event["folder"])
    return decision, done


def check_target(folder: RunFolder, step: int) -> list[Problem]:
    """Problems when there is no complete checkpoint of this step. Reads its manifest only."""
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
    """Write the event of a return to `step` and set newer checkpoints aside.

    Rank 0 calls it when the engine has loaded the state of `step`, before the record is opened.
    """
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
    """Set aside the checkpoints of the newest `went_back` event that are not set aside yet, and start a new W&B run.

    Rank 0 calls it before the first step of an attempt, also to finish what a kill interrupted. No step comes before it, so
    a listed checkpoint without an event of its own belongs to the old branch.
    """
    event, done = _newest_decision(folder)
    if event is None:
        return
    for name in event["checkpoints"]:
        if name in done:
            continue
        path = folder.checkpoints / name
        # A kill may have come after the folder was renamed and before its event was written.
        kept_as = move_aside(path, ASIDE).name if path.exists() else f"{name}.{ASIDE}"
        announce(EventKind.CHECKPOINT_ROLLED_BACK, folder=name, kept_as=kept_as)
    if folder.wandb_id.read_text().strip() != event["wandb_id"]:
        # The rows that W&B has belong to the old branch.
        (folder.wandb / "cursor.json").unlink(missing_ok=True)
        write_atomically(folder.wandb_id, event["wandb_id"] + "\n")
