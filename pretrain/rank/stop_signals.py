"""Signals that ask a run to end. In: signals. Out: `StopSignals.requested`, which the loop reads once a step on all ranks.

SIGINT asks to stop (a person did), SIGTERM and SIGUSR1 to make room (a scheduler did: the run is preempted and may go
on later), SIGHUP too, unless it is ignored (nohup). Each: finish the step, save, write the outcome. Repeats within 5 s
count once, for torchrun passes every signal on twice. A later one ends the process at once with 128 + its number.

The kernel's side writes each signal into a pipe that a thread reads: Python's own handlers wait for the main thread,
which may be stuck in a collective whose partner is gone, and "at once" must work just then.

Torch-free.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from pretrain.run.heartbeat import Heartbeat

# Levels of a request, ordered so that the maximum over the ranks is what all of them do.
NONE, STOPPED, PREEMPTED = 0, 1, 2
STATE_OF = {STOPPED: "stopped", PREEMPTED: "preempted"}
LEVEL_OF = {signal.SIGINT: STOPPED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED, signal.SIGHUP: PREEMPTED}
_LEVEL_OF_NUMBER = {int(number): level for number, level in LEVEL_OF.items()}

REPEAT_S = 5.0


class StopSignals:
    """Install once a process, in the main thread and early: before it, a signal ends the process as it always does."""

    def __init__(
        self, at_once: Callable[[str], None] | None = None, repeat_s: float = REPEAT_S, beat: Heartbeat | None = None
    ) -> None:
        """`at_once(signal name)` runs in the reading thread right before the process ends at once; keep it short.

        `beat` knows what the process is doing, for the message that a stop prints.
        """
        self.requested = NONE
        self.signal_name = ""
        self.beat = beat or Heartbeat({})
        self._at_once = at_once
        self._repeat_s = repeat_s
        self._first_s = 0.0

    def install(self) -> StopSignals:
        """Raises ValueError outside the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in LEVEL_OF:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, _leave_to_reader)
        threading.Thread(target=self._read, args=(reader,), name="stop-signals", daemon=True).start()
        return self

    @property
    def state(self) -> str:
        """The outcome's state for what was requested here; empty: nothing was."""
        return STATE_OF.get(self.requested, "")

    def _read(self, reader: int) -> None:
        while data := os.read(reader, 64):
            for number in data:
                self.receive(number, time.monotonic())

    def receive(self, number: int, now_s: float) -> None:
        """One signal at `now_s` (any monotonic clock)."""
        level = _LEVEL_OF_NUMBER.get(number, NONE)
        if level == NONE:
            return
        name = signal.Signals(number).name
        if self.requested == NONE:
            self._first_s = now_s
            self.signal_name = name
            self.requested = level
            doing = self.beat.describe()
            self._say(f"{name} during {doing}: finishing the step and saving; once more after {self._repeat_s:g} s: at once")
        elif now_s - self._first_s >= self._repeat_s:
            self._say(f"{name} again during {self.beat.describe()}: ending at once, without saving")
            if self._at_once is not None:
                self._at_once(name)
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        # os.write: the main thread may hold the lock of sys.stderr while it is stuck.
        os.write(2, f"phalanx: {text}\n".encode())


def _leave_to_reader(number: int, frame: object) -> None:
    """A Python-level handler must exist for the wakeup pipe to be written; the reading thread does the work."""
