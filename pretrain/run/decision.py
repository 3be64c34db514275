"""Was the decision that `checkpoint.resume_step` stands for taken already? In: the run folder's events. Out: what is left to do.

A scheduler starts a run again with the words of its first start, so the words alone don't say. The decision is the event
`went_back`; pretrain/checkpoint/going_back.py takes it and carries it out.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.run.events import EventKind
from pretrain.run.files import iterate_lines
from pretrain.run.folder import RunFolder


def events_of(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The whole rows of events.jsonl, oldest first; none where the file is not there yet."""
    if not folder.events.exists():
        return iter(())
    return (row for _, row in iterate_lines(folder.events) if row is not None)


def pending_step(folder: RunFolder, resume_step: int | None) -> int | None:
    """The step that a start with this `checkpoint.resume_step` goes back to.

    None: there is nothing to decide, or the newest decision was for this step, and every attempt since had the same
    `resume_step`.
    """
    if resume_step is None:
        return None
    decided: int | None = None
    for event in events_of(folder):
        if event.get("kind") == EventKind.WENT_BACK:
            decided = event["to_step"]
        elif event.get("kind") == EventKind.ATTEMPT and event.get("resume_step") != decided:
            decided = None
    return resume_step if decided != resume_step else None
