"""Tells a watchdog in another process what this rank is doing. In: each phase as it begins. Out: a record, rewritten in place.

The training thread writes each beat itself, in some 10 µs, so a rank that is stuck sends no beats. The records lie on this
machine: no remote file system is involved. Without PHALANX_BEAT_DIR nothing is written. The phase is kept all the same, for
the message that a stop request prints.

Torch-free.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain.run.beat import BEAT_DIR, ENDING, OF_A_STEP, STARTING, WAITING, Beat, beat_path, encode, stack_path
from pretrain.run.process import process_start_ticks

# The number of steps or probes in a median. One slow step does not make a rank a straggler.
_WINDOW = 20


class Heartbeat:
    """A rank's current phase and step. Times are seconds of the monotonic clock, which all processes of a machine share."""

    def __init__(self, environ: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = STARTING
        self.step = 0
        self._rollbacks = 0
        self._clock = clock
        self._since_s = clock()
        self._step_s = 0.0
        self._step_times_s: deque[float] = deque(maxlen=_WINDOW)
        self._batch_waits_s: deque[float] = deque(maxlen=_WINDOW)
        self._probes_s: deque[float] = deque(maxlen=_WINDOW)
        rank = environ.get("RANK", "0")
        self._rank = int(rank) if rank.isdecimal() else 0
        self._folder = Path(environ[BEAT_DIR]) if environ.get(BEAT_DIR) else None
        self._descriptor: int | None = None
        self._pid = self._start_ticks = 0

    def start(self) -> None:
        """Make SIGUSR2 write all stacks to the rank's stack file, and write the first beat.

        Call it once a process, before anything slow. Raises OSError.
        """
        if self._folder is None:
            return
        # The handler is C code, so it works while the main thread is stuck in a collective. It appends, because a watchdog may
        # ask twice.
        stacks = os.open(stack_path(self._folder, self._rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True, chain=False)
        self._pid = os.getpid()
        self._start_ticks = process_start_ticks(self._pid)
        # The handler is installed before the first beat: a watchdog may signal every process that has a beat, and without the
        # handler SIGUSR2 would kill it.
        self._descriptor = os.open(beat_path(self._folder, self._rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._write()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Record that a phase of pretrain/run/beat.py begins. `step`: the number of the step, where it changes."""
        now_s = self._clock()
        passed_s = now_s - self._since_s
        if self.phase == WAITING:
            self._batch_waits_s.append(passed_s)
        if self.phase in OF_A_STEP:
            self._step_s += passed_s
        if step is not None and step != self.step:
            if self._step_s:
                self._step_times_s.append(self._step_s)
            self._step_s = 0.0
            self._rollbacks += step < self.step
            self.step = step
        self.phase = phase
        self._since_s = now_s
        self._write()

    def probed(self, probe_s: float) -> None:
        """Record the duration of the speed probe, in seconds."""
        self._probes_s.append(probe_s)

    def end(self) -> None:
        """Write the last phase. A watchdog regards a process that exits after this phase as one that ended well."""
        self.enter(ENDING)

    def describe(self) -> str:
        """The step and the phase as text, for example "step 12, forward and backward"."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    def _write(self) -> None:
        if self._descriptor is None:
            return
        beat = Beat(
            rank=self._rank,
            pid=self._pid,
            start_ticks=self._start_ticks,
            phase=self.phase,
            step=self.step,
            since_s=self._since_s,
            rollbacks=self._rollbacks,
            step_time_s=_median(self._step_times_s),
            batch_wait_s=_median(self._batch_waits_s),
            probe_s=_median(self._probes_s),
        )
        os.pwrite(self._descriptor, encode(beat), 0)


def _median(values: deque[float]) -> float | None:
    return round(statistics.median(values), 6) if values else None
