"""What ranks and their agents do about processes alike: die with the parent, name their machine. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Mapping

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """SIGKILL for this process when its parent (the thread that forked it) dies, however that happens. Raises OSError."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def node_name(environ: Mapping[str, str]) -> str:
    """As the scheduler calls this machine, which is what it can be told to keep off; else the host's own name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()
