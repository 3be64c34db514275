"""Everything that the page tells about a run. In: a run folder. Out: one JSON document.

`RunReader` keeps what it has read of the record, so that a living run is followed without reading it again. Nothing is written.

Torch-free.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from typing import Any

from configs.errors import json_value
from configs.launch_schema import Launch
from configs.schema import Config
from launch.status import RunStatus, read_status
from launch.status_text import TIMES
from pretrain.metrics.expert_loads import expert_loads
from pretrain.metrics.goodput import attempt_seconds
from pretrain.run.evaluations import score_curves
from pretrain.run.event_rows import scan_events
from pretrain.run.folder import RunFolder
from pretrain.run.follow import RecordFollower
from tools.data.progress import LINE_INTERVAL_S
from tools.report.curves import Curves
from tools.report.life import Life
from tools.report.settings import changed_layouts, layout_and_plan, read_config, settings

_NEXT = {
    "queued": ("logs {run} --follow", "cancel {run}"),
    "starting": ("logs {run} --follow", "cancel {run}"),
    "running": ("logs {run} --follow", "cancel {run}"),
    "finished": ("generate {run}", "convert export {run} {run}/huggingface"),
    "diverged": ("logs {run}", "launch {run}/config.yaml checkpoint.resume_step=STEP"),
}
_NEXT_OTHERWISE = ("resume {run}", "logs {run}")


class RunReader:
    """Reads one run, again and again. `curves` has what was read of the record."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.curves = Curves()
        self._follower = RecordFollower(folder.metrics)

    def read(self, room: int) -> dict[str, Any]:
        """The run's document. `room`: how many points all curves together may have. Raises ConfigError and OSError."""
        replaced, told_s = self._follower.replaced, time.monotonic()
        for part in self._follower.parts():
            if self._follower.replaced != replaced:
                # A rollback rewrote the record, and all its rows follow once more.
                replaced, self.curves = self._follower.replaced, Curves()
            self.curves.add(part)
            if time.monotonic() - told_s >= LINE_INTERVAL_S:
                told_s = time.monotonic()
                self._tell_progress()
        folder = self.folder
        status = read_status(folder, is_whole=True)
        config, found = read_config(folder), settings(folder)
        life = Life().add_all(scan_events(folder))
        now_s = time.time()
        layouts = changed_layouts(found["changes"])
        marks = [mark | {"kind": "layout", "text": f"{mark['text']}: {layouts[mark['attempt']]}"}
                 if mark.get("attempt") in layouts else mark for mark in life.marks]  # fmt: skip
        document = {
            "name": folder.path.name,
            "path": str(folder.path),
            "status": _complete(status, self.curves).as_dict(),
            "cost": _cost(config, status),
            "next": [
                f"phalanx {words.format(run=shlex.quote(str(folder.path)))}" for words in _NEXT.get(status.state, _NEXT_OTHERWISE)
            ],
            "times": TIMES,
            "curves": self.curves.points(room),
            "marks": marks,
            "life": life.as_dict(now_s if status.live else None),
            "experts": expert_loads(folder.experts),
            "tasks": score_curves(folder),
            "layout": layout_and_plan(config),
            "settings": found,
        }
        return json_value(document)

    def _tell_progress(self) -> None:
        """A line on stderr: a record of gigabytes takes minutes."""
        path = self.folder.metrics
        read_mb, size_mb = self._follower.place / 1e6, path.stat().st_size / 1e6
        print(f"{path}: {read_mb:,.0f} of {size_mb:,.0f} MB read", file=sys.stderr, flush=True)


def _complete(status: RunStatus, curves: Curves) -> RunStatus:
    """With the newest validation loss of the whole record: the status looks at its end only."""
    return replace(status, val_loss=curves.newest.get("val_loss", status.val_loss))


def rank_hours(launch: Launch, status: RunStatus) -> float | None:
    """Time of all attempts times the ranks of the newest one. None: nothing is known of its time."""
    if status.goodput is None:
        return None
    return attempt_seconds(status.goodput) / 3600 * launch.nodes * launch.processes_per_node


def _cost(config: Config | str, status: RunStatus) -> dict[str, float] | None:
    """GPU-hours so far by the ranks of the newest attempt, and their price where one is known. None: not known."""
    hours = None if isinstance(config, str) else rank_hours(config.launch, status)
    if isinstance(config, str) or hours is None:
        return None
    ranks, price = config.launch.nodes * config.launch.processes_per_node, config.cluster.price_per_gpu_hour_usd
    return {"rank_hours": hours, "ranks": ranks} | ({"usd": hours * price} if price is not None else {})
