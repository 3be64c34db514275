"""Ends a live run. In: the run folder. Out: SIGINT to its launcher, or to rank 0 of a run started by hand; then a wait.

Only a process that is certainly the recorded one is signalled: same host, same pid, same start time.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any

from configs.errors import ConfigError, Problem
from configs.files import read_json
from configs.run_folder import RunFolder, live_holder, process_start_ticks

POLL_S = 0.2


def cancel(folder: RunFolder, wait_s: float) -> str:
    """Ask the run to save and stop, and wait for it. Returns what happened. Raises ConfigError when nothing here can be asked."""
    target = find_process(folder)
    if target is None:
        return "nothing to cancel: no attempt is live in this folder"
    name, pid = target
    os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if live_holder(folder) is None and find_process(folder) is None:
            outcome = folder.read_outcome()
            return f"{outcome.state} at step {outcome.step}: {outcome.why}" if outcome else "ended before it had begun to train"
        time.sleep(POLL_S)
    return f"asked {name} (process {pid}) to save and stop; it still saves. Again after 5 s ends it at once."


def find_process(folder: RunFolder) -> tuple[str, int] | None:
    """(launcher or rank 0, pid) of the live run on this host; None: nothing is live. Raises ConfigError: live elsewhere."""
    for attempt in reversed(folder.claimed_attempts()):
        launcher = read_json(folder.launch_dir(attempt) / "launcher.json")
        if isinstance(launcher, dict) and _is_live(launcher):
            return "the launcher", int(launcher["pid"])
    holder = live_holder(folder)
    if holder is None:
        return None
    if _is_live({"host": holder.host, "pid": holder.pid, "start_ticks": holder.start_ticks}):
        return "rank 0", holder.pid
    rule = f"a local run is cancelled on its own host; this one is held by {holder.describe()}"
    raise ConfigError(Problem("RUN_DIR", str(folder.path), rule, f"run phalanx cancel on {holder.host}"))


def _is_live(process: dict[str, Any]) -> bool:
    ticks = process.get("start_ticks", 0)
    return process.get("host") == socket.gethostname() and ticks != 0 and process_start_ticks(int(process["pid"])) == ticks
