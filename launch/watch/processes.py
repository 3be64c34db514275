"""What the kernel says of other processes. In: pids. Out: their state, their children, the signals that they catch. Linux.

A pid alone may name a later process: where it matters the start time goes with it.

Torch-free.
"""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.run.folder import process_start_ticks

# /proc/PID/stat's letter → our word. What isn't listed can run, or sleeps and can be woken.
_STATES = {"T": "stopped", "t": "traced", "Z": "zombie", "X": "zombie", "D": "uninterruptible"}
# These make no progress whatever they wait for.
STUCK = ("stopped", "traced", "zombie", "gone")


def state_of(pid: int, start_ticks: int) -> str:
    """alive, stopped (SIGSTOP), traced (a debugger), zombie, uninterruptible (in the kernel), or gone."""
    fields = _stat_fields(pid)
    if not fields:
        return "gone"
    state = _STATES.get(fields[0], "alive")
    if state != "zombie" and start_ticks and process_start_ticks(pid) not in (0, start_ticks):
        return "gone"
    return state


def waits_in_kernel(pid: int) -> str:
    """The kernel function that a sleeping process is in; empty: it runs, or the kernel doesn't say."""
    text = _text(Path(f"/proc/{pid}/wchan"))
    return "" if text == "0" else text


def children_of(parent: int) -> list[int]:
    """The live children of a process, oldest first. Costs a file a thread of it; where the kernel has none, a file a process."""
    lists = list(Path(f"/proc/{parent}/task").glob("*/children"))
    if lists:
        pids = [int(word) for path in lists for word in _text(path).split()]
    else:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    fields = {pid: _stat_fields(pid) for pid in pids}
    return sorted(pid for pid, own in fields.items() if own and int(own[1]) == parent and own[0] not in "ZX")


def catches(pid: int, number: int) -> bool:
    """Has the process a handler of its own for this signal? False for one that is gone."""
    lines = _text(Path(f"/proc/{pid}/status")).splitlines()
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(mask >> (number - 1) & 1)


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, …; empty: no such process."""
    return _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _text(path: Path) -> str:
    """Empty: the process has ended, or isn't ours to look at."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
