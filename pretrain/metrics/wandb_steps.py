"""What W&B has already. In: the run folder's wandb/ and its cursor. Out: the set of steps not to send again.

Offline, the `.wandb` files themselves are read: only what is truly in them counts. The cursor (wandb/cursor.json) keeps
the steps of each segment, as last seen in its file, for the day when `wandb sync --clean` has taken the file away; and
the step that the server was last known to have. Online, the server's own summary decides.

A step that a resume replays is in W&B already, and stays there in its first version: W&B can't take rows back. The
record has the newest version; on an unchanged layout both are bit for bit the same. Steps before a rollback stay there too,
as the ones that were not gone on from: W&B's curve shows them up to the refused step, the record the ones made instead.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from parallel.compat.wandb_files import is_empty, steps_in
from pretrain.run.files import read_json, write_json
from pretrain.run.folder import RunFolder

Spans = list[list[int]]


class Cursor:
    """wandb/cursor.json: {"segments": {folder: [[first, last], …]}, "server_step": last step the server was known to have}."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.wandb / "cursor.json"
        value = read_json(self._path)
        known: dict[str, Any] = value if isinstance(value, dict) else {}
        self.segments: dict[str, Spans] = dict(known.get("segments", {}))
        self.server_step: int = int(known.get("server_step", 0))

    def save(self) -> None:
        """Write the cursor. Raises OSError."""
        write_json(self._path, {"segments": self.segments, "server_step": self.server_step})


def find_segments(folder: RunFolder, wandb_id: str) -> list[Path]:
    """The `.wandb` files of this run, one an attempt, offline and online, oldest first."""
    return sorted(
        path
        for kind in ("offline-run", "run")
        for path in folder.wandb.glob(f"{kind}-*-{wandb_id}/run-{wandb_id}.wandb")
        if not path.parent.is_symlink()
    )


def steps_offline(folder: RunFolder, wandb_id: str, cursor: Cursor) -> set[int]:
    """Steps handed over for good: in a file on this disk, in a file that was here, or on the server. Updates the cursor."""
    for path in find_segments(folder, wandb_id):
        cursor.segments[path.parent.name] = to_spans(steps_in(path))
    steps = {step for spans in cursor.segments.values() for step in from_spans(spans)}
    return steps | set(range(1, cursor.server_step + 1))


def mark_synced(folder: RunFolder, wandb_id: str, only_empty: bool = False) -> None:
    """The server has every step: tell `wandb sync` to leave the offline segments alone (it looks for this marker).

    `only_empty`: those of writers that were killed at once. wandb 0.31 sends nothing of all segments behind an empty one,
    and exits 0. Call it before a segment of one's own is begun.
    """
    for path in find_segments(folder, wandb_id):
        if path.parent.name.startswith("offline-run-") and (is_empty(path) or not only_empty):
            path.with_name(path.name + ".synced").touch()


def to_spans(steps: Iterable[int]) -> Spans:
    """{1, 2, 3, 7} → [[1, 3], [7, 7]]."""
    spans: Spans = []
    for step in sorted(steps):
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return spans


def from_spans(spans: Spans) -> set[int]:
    return {step for first, last in spans for step in range(first, last + 1)}
