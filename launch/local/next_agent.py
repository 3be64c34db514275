"""Holds the standby of the local launcher's next attempt. In: torchrun's command, when to start it. Out: a process, or None.

Torch-free.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.standby import Standby


class NextAgent:
    """`after_s`: how many seconds after the start of an attempt the standby of the next one starts; None: never."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], after_s: float | None) -> None:
        self.after_s = after_s
        self._command, self._environ = command, environ
        self._standby: Standby | None = None
        self._begun_s = time.monotonic()

    def choose_mark(self) -> str:
        """The launch's mark for the attempt that begins: that of the standby if there is one."""
        return secrets.token_hex(8) if self._standby is None else self._standby.mark

    def begin(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> subprocess.Popen[bytes] | None:
        """As `Standby.begin`, for the attempt that begins. None too without a standby."""
        standby, self._standby, self._begun_s = self._standby, None, time.monotonic()
        return None if standby is None else standby.begin(command, environ, log)

    def look(self) -> None:
        """Start the standby of the next attempt when it is due."""
        if self._standby is not None or self.after_s is None or time.monotonic() - self._begun_s < self.after_s:
            return
        try:
            # A session of its own: a Ctrl-C at the terminal is for the launcher alone.
            self._standby = Standby(self._command, self._environ, start_new_session=True)
        except OSError as error:
            self.after_s = None
            print(f"phalanx: no standby for the next attempt: {error}", file=sys.stderr, flush=True)

    def drop(self) -> None:
        """End the standby: no attempt follows."""
        if self._standby is not None:
            self._standby.kill()
