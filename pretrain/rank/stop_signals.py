"""Signals that ask a run to end. In: signals. Out: `StopSignals.requested`, which the loop reads once a step on all ranks.

SIGINT comes from a person and stops the run. SIGTERM and SIGUSR1 come from a scheduler and preempt it, so that it may continue
later. SIGHUP preempts it too, unless nohup made the process ignore it. After each of them the run finishes its step, saves, and
writes its outcome. Repeats within 5 s count once, because torchrun forwards every signal twice. A later repeat ends the process
immediately, with exit code 128 + the signal's number.

The C handler writes each signal into a pipe, and a thread reads the pipe. A Python handler would wait for the main thread, which
may be stuck in a collective whose partner has died. An immediate end must work in that state.

Torch-free.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from pretrain.run.heartbeat import Heartbeat

# The levels of a request. All ranks act on the maximum over the ranks.
NONE, STOPPED, PREEMPTED = 0, 1, 2
STATE_OF = {STOPPED: "stopped", PREEMPTED: "preempted"}
LEVEL_OF = {signal.SIGINT: STOPPED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED, signal.SIGHUP: PREEMPTED}
_LEVEL_OF_NUMBER = {int(number): level for number, level in LEVEL_OF.items()}

REPEAT_S = 5.0


class StopSignals:
    """The stop requests of this process. Install it once, early, in the main thread. Until then signals act as by default."""

    def __init__(
        self, at_once: Callable[[str], None] | None = None, repeat_s: float = REPEAT_S, beat: Heartbeat | None = None
    ) -> None:
        """`at_once(signal name)` runs in the reading thread just before an immediate end, so it must be short.

        `repeat_s`: repeats within so many seconds count once. `beat`: the process's phase, which the messages name.
        """
        self.requested = NONE
        self.signal_name = ""
        self.beat = beat or Heartbeat({})
        self._at_once = at_once
        self._repeat_s = repeat_s
        self._first_s = 0.0

    def install(self) -> StopSignals:
        """Install the handlers and start the reading thread. Raises ValueError outside the main thread."""
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
        """The state that the outcome has for the request of this process; empty without a request."""
        return STATE_OF.get(self.requested, "")

    def _read(self, reader: int) -> None:
        while data := os.read(reader, 64):
            for number in data:
                self.receive(number, time.monotonic())

    def receive(self, number: int, now_s: float) -> None:
        """Handle one signal that arrived at `now_s`, in seconds of any monotonic clock."""
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
        # os.write needs no lock. The main thread may hold the lock of sys.stderr while it is stuck.
        os.write(2, f"phalanx: {text}\n".encode())


def _leave_to_reader(number: int, frame: object) -> None:
    """Do nothing. Python writes to the wakeup pipe only when a handler exists; the reading thread handles the signal."""
