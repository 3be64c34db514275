"""Ends what a launch left behind. In: the launch's mark, and a pipe that breaks when the launcher dies. Linux (/proc).

A program of its own (standard library only, started with -I -S in some 10 ms), because nothing inside the launcher can
act after the launcher's SIGKILL. Every process of a launch carries the mark in its environment, in whatever session or
process group, whoever adopted it: that finds them all.

Torch-free.
"""

from __future__ import annotations

import os
import signal
import sys
import time

MARK_NAME = "PHALANX_LAUNCH"
# A process that was just being forked shows up within this.
_QUIET_S = 1.0
# W&B's copy takes some seconds to send the last rows.
LINGER_S = 8.0
# A process stuck in the kernel (a hung GPU driver, a lost file server) dies only when the kernel lets it.
_GIVE_UP_S = 30.0


def marked_pids(mark: str) -> list[int]:
    """Processes of this user that carry the mark, this one excepted."""
    wanted = f"{MARK_NAME}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if wanted in file.read().split(b"\0"):
                        found.append(int(name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                # Ended meanwhile, or another user's.
                continue
    return found


def kill_marked(mark: str, quiet_s: float = _QUIET_S) -> int:
    """SIGKILL every marked process until none has been seen for `quiet_s`; returns how many were killed."""
    killed: set[int] = set()
    quiet_since = time.monotonic()
    deadline = quiet_since + _GIVE_UP_S
    while time.monotonic() - quiet_since < quiet_s and time.monotonic() < deadline:
        for pid in marked_pids(mark):
            quiet_since = time.monotonic()
            killed.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return len(killed)


def clear_up(mark: str, linger_s: float) -> None:
    """Wait for the last marked processes, then kill what stays."""
    deadline = time.monotonic() + linger_s
    while marked_pids(mark):
        if time.monotonic() >= deadline:
            kill_marked(mark, quiet_s=0.2)
            return
        time.sleep(0.1)


def main() -> int:
    """Wait on stdin: the word `done` ends the guard, a broken pipe ends the launch."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.read() != "done":
        kill_marked(sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
