"""Whether a run has already returned to the step that `checkpoint.resume_step` names. In: its events. Out: the step, or None.

A scheduler starts a run again with the command line of its first start, so the command line doesn't tell. The event `went_back`
does. pretrain/checkpoint/going_back.py writes the event and carries the return out.

Torch-free.
"""

from __future__ import annotations

from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.folder import RunFolder


def pending_step(folder: RunFolder, resume_step: int | None) -> int | None:
    """The step to which a start with this `checkpoint.resume_step` returns.

    None: `resume_step` is None, or the newest `went_back` event was for this step and every attempt since then had the same
    `resume_step`.
    """
    if resume_step is None:
        return None
    decided: int | None = None
    for event in read_events(folder):
        if event.get("kind") == EventKind.WENT_BACK:
            decided = event["to_step"]
        elif event.get("kind") == EventKind.ATTEMPT and event.get("resume_step") != decided:
            decided = None
    return resume_step if decided != resume_step else None
