"""Reads the state of other processes from /proc. In: pids. Out: states, children and caught signals. Linux only.

The kernel reuses pids. Functions that must not confuse a process with a later one take the process's start time too.

Torch-free.
"""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.run.process import process_start_ticks

# The state letter of /proc/PID/stat → our name for it. All other letters mean a process that runs or can be woken.
_STATES = {"T": "stopped", "t": "traced", "Z": "zombie", "X": "zombie", "D": "uninterruptible"}
# The name of the process that torchrun's ranks are forked from (launch/fork_server.py).
FORK_SERVER = "fork server"
# The name of a torchrun that waits for its attempt (launch/standby.py).
STANDBY = "standby"
# A process in one of these states makes no progress, whatever it waits for.
STUCK = ("stopped", "traced", "zombie", "gone")


def state_of(pid: int, start_ticks: int) -> str:
    """One of alive, stopped, traced, zombie, uninterruptible and gone.

    stopped: by SIGSTOP. traced: a debugger holds the process. uninterruptible: the process sleeps in the kernel and takes no
    signal. `start_ticks`: the start time that the process must have, in clock ticks since boot; 0: any.
    """
    fields = _stat_fields(pid)
    if not fields:
        return "gone"
    state = _STATES.get(fields[0], "alive")
    if state != "zombie" and start_ticks and process_start_ticks(pid) not in (0, start_ticks):
        return "gone"
    return state


def waits_in_kernel(pid: int) -> str:
    """The kernel function in which a process sleeps. Empty: the process runs, or the kernel doesn't tell."""
    text = _text(Path(f"/proc/{pid}/wchan"))
    return "" if text == "0" else text


def children_of(parent: int) -> list[int]:
    """The pids of the live children of a process, in ascending order.

    The call reads one file per thread of the parent. Kernels without /proc/PID/task/TID/children cost one file per process of
    the machine.
    """
    lists = list(Path(f"/proc/{parent}/task").glob("*/children"))
    if lists:
        pids = [int(word) for path in lists for word in _text(path).split()]
    else:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    fields = {pid: _stat_fields(pid) for pid in pids}
    return sorted(pid for pid, own in fields.items() if own and int(own[1]) == parent and own[0] not in "ZX")


def ranks_of(torchrun: int) -> list[int]:
    """The pids of the ranks that a torchrun started, in ascending order: its children, or those of its fork server."""
    children = children_of(torchrun)
    servers = [pid for pid in children if name_of(pid) == FORK_SERVER]
    return children_of(servers[0]) if servers else children


def name_of(pid: int) -> str:
    """The name that a process has given itself, such as "rank 0" (pretrain/run/process.py). Empty: the process is gone."""
    return _text(Path(f"/proc/{pid}/comm")).removesuffix("\n")


def catches(pid: int, number: int) -> bool:
    """Whether the process has its own handler for the signal `number`. False if the process is gone."""
    lines = _text(Path(f"/proc/{pid}/status")).splitlines()
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(mask >> (number - 1) & 1)


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the process name: state, parent, …. Empty: there is no such process."""
    return _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _text(path: Path) -> str:
    """The text of the file. Empty: the process has ended, or belongs to another user."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
