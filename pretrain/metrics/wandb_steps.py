"""The steps that W&B already has. In: the run folder's wandb/ and its cursor. Out: the steps not to send again, or those to send.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.compat.wandb_files import is_empty, steps_in
from pretrain.run.files import read_json, write_json
from pretrain.run.folder import RunFolder

Spans = list[list[int]]
# A larger number is damage. A byte for each step would take the memory of a login node.
_MOST_STEPS = 100_000_000
_IN_FILES, _SENT = 1, 2


class Cursor:
    """The file wandb/cursor.json: {"segments": {folder: [[first step, last step], …]}, "server_step": newest on the server,
    "mode": online or offline, as the newest attempt asked for it}. What is damaged in it counts as absent.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.wandb / "cursor.json"
        value = read_json(self._path)
        known: dict[str, Any] = value if isinstance(value, dict) else {}
        segments, server_step = known.get("segments"), known.get("server_step")
        segments = segments if isinstance(segments, dict) else {}
        self.segments: dict[str, Spans] = {name: spans for name, spans in segments.items() if _is_spans(spans)}
        self.server_step: int = server_step if isinstance(server_step, int) else 0
        self.mode: str = str(known.get("mode", ""))

    def save(self) -> None:
        """Write the cursor. Raises OSError."""
        write_json(self._path, {"segments": self.segments, "server_step": self.server_step, "mode": self.mode})


@dataclass(frozen=True)
class CopyState:
    """How far W&B's copy of the record is.

    `lacking_steps`: steps of the record that the server is not known to have. `in_files_steps`: those of them that offline files
    hold. `mode`: online or offline, as the newest attempt asked for it.
    """

    wandb_id: str
    mode: str
    lacking_steps: int
    in_files_steps: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_copy_state(folder: RunFolder, last_step: int, is_live: bool) -> CopyState | None:
    """The state of the copy of a record that is at `last_step`. None: the run has no copy. Raises OSError.

    While the run lives, a step that was handed to an online W&B process counts as sent.
    """
    if not copy_lock(folder).exists() or not folder.wandb_id.exists() or last_step > _MOST_STEPS:
        return None
    wandb_id, cursor = folder.wandb_id.read_text(errors="replace").strip(), Cursor(folder)
    sent, in_files = [[1, cursor.server_step]], []
    for name, spans in cursor.segments.items():
        offline, segment = name.startswith("offline-run-"), folder.wandb / name
        if offline and segment.exists() and not _synced_mark(segment, wandb_id).exists():
            in_files += spans
        elif offline or is_live:
            sent += spans
    marks = bytearray(last_step + 1)
    for mark, spans in ((_IN_FILES, in_files), (_SENT, sent)):
        for first, last in spans:
            first, last = max(first, 1), min(last, last_step)
            if first <= last:
                marks[first : last + 1] = bytes([mark]) * (last - first + 1)
    return CopyState(wandb_id, cursor.mode, last_step - marks.count(_SENT), marks.count(_IN_FILES))


def copy_lock(folder: RunFolder) -> Path:
    """The file that a process locks while it sends rows to W&B."""
    return folder.wandb / "lock"


def _synced_mark(segment: Path, wandb_id: str) -> Path:
    """The file by which `wandb sync` recognises a segment that the server has. `segment`: its folder."""
    return segment / f"run-{wandb_id}.wandb.synced"


def _is_spans(value: Any) -> bool:
    """Whether the value is a list of [first step, last step]."""
    return isinstance(value, list) and all(
        isinstance(span, list) and len(span) == 2 and all(isinstance(step, int) for step in span) for span in value
    )


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
            _synced_mark(path.parent, wandb_id).touch()


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
    """The steps in spans of (first, last), both included."""
    return {step for first, last in spans for step in range(first, last + 1)}
