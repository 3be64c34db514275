"""Which processes of a run are alive on this host. In: the run folder. Out: the pid of a launcher, or yes or no.

A pid counts only together with the host and the start time in its record, because the kernel may have given it to another
process.

Torch-free.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from pretrain.run.files import read_json
from pretrain.run.folder import RunFolder
from pretrain.run.lock import live_holder
from pretrain.run.process import process_start_ticks


def is_live(process: Mapping[str, Any]) -> bool:
    """Whether the process of `host`, `pid` and `start_ticks` lives here."""
    host, pid, ticks = (process.get(name) for name in ("host", "pid", "start_ticks"))
    if not isinstance(pid, int) or not ticks or host != socket.gethostname():
        return False
    return process_start_ticks(pid) == ticks


def live_launcher(folder: RunFolder) -> int | None:
    """The pid of a launcher of this run that lives here. None: there is none, or it lives elsewhere."""
    for attempt in reversed(folder.claimed_attempts()):
        if (launcher := _launcher(folder, attempt)) and is_live(launcher):
            return int(launcher["pid"])
    return None


def launcher_is_gone(folder: RunFolder) -> bool:
    """Whether the newest attempt was launched on this host, by a process that has ended."""
    launcher = _launcher(folder, max(folder.claimed_attempts(), default=0))
    return launcher.get("host") == socket.gethostname() and not is_live(launcher)


def attempt_is_live(folder: RunFolder) -> bool:
    """Whether the newest attempt trains, or is about to: its launcher lives here, and no outcome is recorded."""
    if live_holder(folder) is not None:
        return True
    outcome = folder.read_outcome()
    has_ended = outcome is not None and outcome.attempt >= max(folder.claimed_attempts(), default=0)
    return not has_ended and live_launcher(folder) is not None


def _launcher(folder: RunFolder, attempt: int) -> dict[str, Any]:
    """What launcher.json of the attempt says; empty: there is none."""
    value = read_json(folder.launch_dir(attempt) / "launcher.json")
    return value if isinstance(value, dict) else {}
