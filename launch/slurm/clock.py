"""How long the job may still run. In: Slurm's time limit, and how long steps and saves took. Out: is it time to save?

Torch-free.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

from launch.slurm import scheduler
from launch.slurm.scheduler import SchedulerError
from pretrain.run.events import EventKind
from pretrain.run.files import recent_rows
from pretrain.run.folder import RunFolder

# An administrator or `scontrol update` may move the end.
REFRESH_S = 60.0
# What the ranks' own end takes beside step and save: the last all-reduce, outcome, W&B's last rows.
MARGIN_S = 30.0


class TimeLimitClock:
    """Asks the controller now and then; while it is away, the last answer holds, or what Slurm set at the start."""

    def __init__(self, folder: RunFolder, job: int, stop_before_s: float, environ: Mapping[str, str]) -> None:
        self._folder, self._job, self._stop_before_s = folder, job, stop_before_s
        text = environ.get("SLURM_JOB_END_TIME", "")
        self._limit_s = float(text) if text.isdecimal() else math.inf
        self.refresh()
        # An attempt that is stopped before it has trained would be started again for ever.
        self._most_s = (self._limit_s - time.time()) / 2

    def refresh(self) -> None:
        """Ask now, and measure again what the end will take."""
        self._asked_s = time.monotonic()
        try:
            self._limit_s = scheduler.details(self._job).limit_s
        except SchedulerError as error:
            print(f"phalanx: the job's time limit is taken as it was: {error}", flush=True)
        self._budget_s = self._measure()

    def left_s(self) -> float:
        """Seconds until the time limit; infinite without one."""
        if time.monotonic() - self._asked_s > REFRESH_S:
            self.refresh()
        return self._limit_s - time.time()

    def is_near(self) -> bool:
        """Is it time to save? At most half of the attempt's time is kept back."""
        return self.left_s() < min(self._budget_s, self._most_s)

    def _measure(self) -> float:
        """launch.slurm.stop_before_s, or more: twice the slowest recent save, three steps, and a margin. In seconds."""
        save_s = max((row["seconds"] for row in recent_rows(self._folder.events) if _is_timed_save(row)), default=None)
        if save_s is None:
            return self._stop_before_s
        rows = recent_rows(self._folder.metrics, tail_bytes=1 << 15)
        steps_s = [row["step_time_s"] for row in rows if isinstance(row.get("step_time_s"), (int, float))]
        return max(self._stop_before_s, 2 * save_s + 3 * (statistics.median(steps_s) if steps_s else 0.0) + MARGIN_S)


def _is_timed_save(row: Mapping[str, object]) -> bool:
    return row.get("kind") == EventKind.SAVED and isinstance(row.get("seconds"), (int, float))
