"""The steps that W&B already has. In: the run folder's wandb/ and its cursor. Out: the set of steps not to send again.

Offline, the steps in the `.wandb` files count. The cursor (wandb/cursor.json) keeps the steps that were last seen in each file,
because `wandb sync --clean` deletes files, and the newest step that the server was known to have. Online, the server's summary
counts.

W&B can't delete rows. A step that a resume repeats therefore stays in W&B in its first version, while the record has the newest
one. On an unchanged layout both are equal bit for bit. Steps that a rollback discarded stay in W&B too, up to the refused step.
The record has the steps that replaced them.

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
    """The file wandb/cursor.json: {"segments": {folder: [[first step, last step], …]}, "server_step": newest on the server}."""

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
    """The steps in a `.wandb` file on this disk, in a file that was deleted, or on the server. Updates the cursor.

    Raises OSError.
    """
    for path in find_segments(folder, wandb_id):
        cursor.segments[path.parent.name] = to_spans(steps_in(path))
    steps = {step for spans in cursor.segments.values() for step in from_spans(spans)}
    return steps | set(range(1, cursor.server_step + 1))


def mark_synced(folder: RunFolder, wandb_id: str, only_empty: bool = False) -> None:
    """Mark offline segments with the file by which `wandb sync` recognises segments that the server has.

    `only_empty`: mark only empty segments, which writers leave when they are killed early. `wandb sync` 0.31 sends no segment
    that follows an empty one, and exits with code 0. Call it before the attempt's own segment exists. Raises OSError.
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
