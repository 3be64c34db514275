"""What our processes do alike: die with the parent, name their machine, import what takes seconds. Linux.

Torch-free.
"""

from __future__ import annotations

import ctypes
import gc
import io
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
    """The scheduler's name of this machine, which its list of excluded nodes accepts; without a scheduler, the hostname."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch and what stands on it: looking for garbage among thousands of modules, which stay, costs a third
    of their time (1.2 s of a rank's 3.9 s), and again at every later look and at the end. One may lie in another.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (`>&-`) /dev/null in their place.

    Otherwise Python has None for them, and the next file that is opened becomes descriptor 1 of every child.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
    if sys.stdin is None:
        sys.stdin = open(0)  # noqa: SIM115  lives as long as the process
    if sys.stdout is None:
        sys.stdout = open(1, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w")  # noqa: SIM115


def print_in_any_locale() -> None:
    """Characters that the locale's encoding lacks become `?` on stdout and stderr instead of an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
