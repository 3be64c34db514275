"""How long the job may still run. In: Slurm's time limit, the duration of steps and saves. Out: whether it is time to save.

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

# The limit is asked for again after this many seconds, because an administrator may change it.
REFRESH_S = 60.0
# Seconds for the end of the ranks beyond a step and a save: the last all-reduce, the outcome, and W&B's last rows.
MARGIN_S = 30.0
# The manual of sbatch says that `--signal` may come up to 60 s early. The handling of the signal adds up to 5 s.
SIGNAL_EARLY_S = 65.0


class TimeLimitClock:
    """The time that is left until the job's time limit. Slurm's controller is asked for the limit every minute.

    While the controller does not answer, its last answer counts. Before the first answer, SLURM_JOB_END_TIME counts.
    """

    def __init__(self, folder: RunFolder, job: int, stop_before_s: float, environ: Mapping[str, str]) -> None:
        self._folder, self._job, self._stop_before_s = folder, job, stop_before_s
        text = environ.get("SLURM_JOB_END_TIME", "")
        self._limit_s = float(text) if text.isdecimal() else math.inf
        self.refresh()
        # Otherwise an attempt could be stopped before it has trained, and be started again for ever.
        self._most_s = (self._limit_s - time.time()) / 2

    def refresh(self) -> None:
        """Ask the controller now, and estimate again how long the end will take."""
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
        """Is it time to save? At most half of the attempt's time is reserved for the end."""
        return self.left_s() < min(self._budget_s, self._most_s)

    def is_announced(self) -> bool:
        """Is a SIGUSR1 at this moment Slurm's announcement of the time limit?"""
        return self.left_s() < max(self._stop_before_s, min(self._budget_s, self._most_s)) + SIGNAL_EARLY_S

    def _measure(self) -> float:
        """Seconds: launch.slurm.stop_before_s, or twice the slowest recent save plus three steps and a margin if that is more."""
        save_s = max((row["seconds"] for row in recent_rows(self._folder.events) if _is_timed_save(row)), default=None)
        if save_s is None:
            return self._stop_before_s
        rows = recent_rows(self._folder.metrics, tail_bytes=1 << 15)
        steps_s = [row["step_time_s"] for row in rows if isinstance(row.get("step_time_s"), (int, float))]
        return max(self._stop_before_s, 2 * save_s + 3 * (statistics.median(steps_s) if steps_s else 0.0) + MARGIN_S)


def _is_timed_save(row: Mapping[str, object]) -> bool:
    return row.get("kind") == EventKind.SAVED and isinstance(row.get("seconds"), (int, float))
