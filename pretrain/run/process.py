"""What all of our processes share: they die with their parent, have names, and import large libraries fast. Linux.

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
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
# The name of a rank's program in the process that the ranks are forked from (launch/fork_server.py): it only imports.
IMPORTS_ONLY = "__imports__"


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that forked it ends, whatever ends it. Raises OSError."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def name_process(name: str) -> None:
    """Give this process a name for `ps` and `top`, of 15 characters at most. Its children inherit the name. Raises OSError."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NAME)")


def node_name(environ: Mapping[str, str]) -> str:
    """The name of this machine in Slurm, as its list of excluded nodes takes it. Without Slurm it is the hostname."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextmanager
def importing() -> Iterator[None]:
    """Switch the garbage collector off around the import of torch and of the libraries that need it.

    The imported modules are never garbage. Searching them costs a third of the import, 1.2 s of a rank's 3.9 s, and more at
    each later collection and at exit. Afterwards they are excluded from collections. Nested use is allowed.
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
    """Open /dev/null in the place of stdin, stdout or stderr where the process was started without it (`>&-`).

    Otherwise Python has None for the stream, and the next file that is opened takes its descriptor and becomes, for example,
    the stdout of every child.
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


def process_start_ticks(pid: int) -> int:
    """Start time of a live process in clock ticks since boot; 0: no such process exists, or the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields_after_name = text.rpartition(")")[2].split()
    return int(fields_after_name[19]) if fields_after_name[0] != "Z" else 0


def process_age_s(pid: int) -> float:
    """How long a live process has existed, in seconds; 0: no such process exists, or the system has no /proc."""
    ticks = process_start_ticks(pid)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0
