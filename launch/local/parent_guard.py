"""Kills the processes that a dead launcher left behind. In: the launch's mark, and a pipe from the launcher. Linux only.

The pipe breaks when the launcher dies. The guard is a program of its own, because no code inside the launcher can act after
the launcher's SIGKILL. The guard uses only the standard library, and with -I -S it starts in about 10 ms. Every process of a
launch carries the mark in its environment. The mark therefore finds processes in other sessions and process groups, and
processes that another parent adopted.

Torch-free.
"""

from __future__ import annotations

import os
import signal
import sys
import time

MARK_NAME = "PHALANX_LAUNCH"
# A process that is being forked becomes visible within this time.
_QUIET_S = 1.0
# The process that copies the metrics to W&B takes some seconds to send the last rows.
LINGER_S = 8.0
# A hung GPU driver or a lost file server keeps a process in the kernel. Such a process dies only when the kernel returns.
_GIVE_UP_S = 30.0


def marked_pids(mark: str) -> list[int]:
    """The pids of this user's processes that carry the mark, without this process."""
    wanted = f"{MARK_NAME}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if wanted in file.read().split(b"\0"):
                        found.append(int(name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                # The process has ended meanwhile, or belongs to another user.
                continue
    return found


def kill_marked(mark: str, quiet_s: float = _QUIET_S) -> int:
    """Send SIGKILL to every marked process until none has been seen for `quiet_s` seconds, for 30 s at most.

    Returns the number of processes that received the signal.
    """
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
    """Wait up to `linger_s` seconds for the marked processes to end, then kill the rest."""
    deadline = time.monotonic() + linger_s
    while marked_pids(mark):
        if time.monotonic() >= deadline:
            kill_marked(mark, quiet_s=0.2)
            return
        time.sleep(0.1)


def main() -> int:
    """Read stdin to its end. The text `done` ends only the guard; any other end of the pipe makes the guard kill the launch."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.read() != "done":
        kill_marked(sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
