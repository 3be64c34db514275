"""Forwards the launcher's signals to its ranks. In: signals. Out: one signal per rank, a message, the requested end state.

The signals go to the ranks and not to torchrun, because torchrun would forward a signal twice and kill the ranks 30 s later.

Torch-free.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, TextIO

from launch.local.parent_guard import kill_marked
from launch.watch.processes import ranks_of
from pretrain.metrics.screen import ScreenWriter

REPEAT_S = 5.0

# Received signal → (the signal that the ranks get, the run's state if the ranks die before they can write an outcome).
_FORWARD = {
    signal.SIGINT: (signal.SIGINT, "stopped"),
    signal.SIGTERM: (signal.SIGTERM, "preempted"),
    signal.SIGUSR1: (signal.SIGUSR1, "preempted"),
    signal.SIGHUP: (signal.SIGTERM, "preempted"),
}


class SignalForwarder:
    """Forwards signals to the ranks, and escalates when they are repeated.

    The first signal asks the ranks to save and end. Further signals are ignored for 5 s. The next signal after that time ends
    the ranks at once. One more signal kills every process that carries the launch's mark. `asked`: the end state that the first
    signal asked for; empty: no signal came. `agent`: the pid of torchrun; 0: none runs. `mark`: that of the attempt that runs.
    """

    def __init__(self, err: TextIO | ScreenWriter) -> None:
        self.asked = self.mark = ""
        self._err = err
        self.agent = 0
        self._waiting: list[int] = []
        self._first_s = 0.0
        self._count = 0
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Install the signal handlers. Call it in the main thread, before the first attempt. Raises ValueError in any other."""
        for number in _FORWARD:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                # nohup has set SIGHUP to be ignored, and the run must survive the end of the terminal.
                continue
            self._before[number] = signal.signal(number, lambda received, _: self._waiting.append(received))

    def restore(self) -> None:
        """Put the previous signal handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Act on the signals that came since the last call."""
        while self._waiting:
            self._receive(signal.Signals(self._waiting.pop(0)))

    def _receive(self, number: signal.Signals) -> None:
        passed, state = _FORWARD[number]
        if self._count and time.monotonic() - self._first_s < REPEAT_S:
            return
        self._count += 1
        if self._count == 1:
            self._first_s = time.monotonic()
            self.asked = state
            follows = f"the ranks finish their step and save; again after {REPEAT_S:g} s: at once"
            self._print(f"{number.name}: {follows if self.agent else 'no other attempt starts'}")
        elif self._count == 2:
            self._print(f"{number.name} again: the ranks end at once; once more: everything is killed")
        else:
            self._print(f"{number.name} once more: everything is killed")
            kill_marked(self.mark, quiet_s=0.2)
            return
        self._forward(passed)

    def _forward(self, number: signal.Signals) -> None:
        """Send the signal to the ranks. Without any rank, send it to the agent, if there is one."""
        for pid in ranks_of(self.agent) or filter(None, [self.agent]):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _print(self, text: str) -> None:
        try:
            print(f"phalanx: {text}", file=self._err, flush=True)
        except OSError:
            # After SIGHUP the terminal may be closed, so that the message reaches nobody.
            return
