"""Finds the rank that failed first. In: an attempt's log folder. Out: the failed ranks, the most likely cause first.

pretrain/rank/process_setup.py writes rank_N.failure.json with the time of a rank's exception. A rank that was killed or that
crashed in C code leaves no such file, but torchrun's log has its exit code. A killed rank comes first in the list, because the
other ranks only report that they lost their peer. torchrun ends the remaining ranks by SIGTERM, and by SIGKILL 30 s later.
Ranks that torchrun ended are not listed.

Torch-free.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.run.files import iterate_lines, read_json
from pretrain.run.folder import EXIT_CODE

# torchrun's own log is torchrun.log on one machine, and NODE.torchrun.log on several nodes.
# launch/watch/gathered_logs.py writes NODE.log and NODE.failures.jsonl.
AGENT_LOG = "torchrun.log"
NODE_LOG = ".log"
GATHERED = ".failures.jsonl"
# The rank number of a failure of the node's agent before it started any rank.
NO_RANK = -1
_TAIL_LINES = 30
_TAIL_BYTES = 1 << 16
# torchrun's summary is at the end of its log: some 200 bytes for each failed rank.
_AGENT_SUMMARY_BYTES = 1 << 22
# torchrun reports every exit code except 0 as a failure. A rank that ends with one of these codes has recorded an outcome.
_IN_ORDER = frozenset(EXIT_CODE[state] for state in ("preempted", "stopped", "diverged"))
# torchrun's summary has one block per failed rank: "rank : 2 (local_rank: 2)", then "exitcode : -9 (pid: 17)".
_AGENT_FAILURE = re.compile(r"^\s*rank\s*:\s*(\d+) .*\n\s*exitcode\s*:\s*(-?\d+) \(pid: (\d+)\)", re.MULTILINE)
_AGENT_KILLED = re.compile(r"Unable to shutdown process (\d+)")


@dataclass(frozen=True)
class Failure:
    """The failure of one rank.

    `time`: when the rank failed, in seconds since the epoch; 0: unknown. `kind`: bad_input, exception, killed (by a signal) or
    exit (with an exit code). `text`: the message for people. `node`: the name of the rank's machine; empty: unknown.
    """

    rank: int
    time: float
    kind: str
    text: str
    node: str = ""


def find_failures(log_dir: Path) -> list[Failure]:
    """All failed ranks, the most likely cause first. The failures that the nodes of a large run gathered are included.

    The order is: ranks that refused bad input, killed ranks, ranks with a recorded exception by its time, ranks with only an
    exit code. Raises OSError if a log can't be read.
    """
    written = {failure.rank: failure for path in log_dir.glob("rank_*.failure.json") if (failure := _read(path))}
    gathered = [_failure_of(row) for path in log_dir.glob(f"*{GATHERED}") for _, row in iterate_lines(path)]
    found = [*written.values(), *(failure for failure in gathered if failure is not None)]
    for path in agent_logs(log_dir):
        node = path.name.removesuffix(AGENT_LOG).rstrip(".")
        for rank, exit_code in _agent_exit_codes(path):
            if rank in written:
                continue
            if exit_code < 0:
                text = f"killed by signal {-exit_code} ({_signal_name(-exit_code)})"
                found.append(Failure(rank, 0.0, "killed", _with_tail(text, log_dir, rank), node))
            else:
                found.append(Failure(rank, 0.0, "exit", _with_tail(f"exit code {exit_code}", log_dir, rank), node))
    # Ranks refuse bad input together, before any of them ends: a rank that then dies of a lost partner is no cause.
    order = {"bad_input": -1, "killed": 0, "exit": 2}
    return sorted(found, key=lambda failure: (order.get(failure.kind, 1), failure.time))


def agent_logs(log_dir: Path) -> list[Path]:
    """The paths of torchrun's own logs: torchrun.log on one machine, or one log per node."""
    return sorted(log_dir.glob(f"*{AGENT_LOG}"))


def describe(failures: list[Failure], log_dir: Path) -> str:
    """The first failure in full, the other failed ranks in one line, and the folder of the logs."""
    if not failures:
        logs = [path for path in agent_logs(log_dir) or log_dir.glob(f"*{NODE_LOG}") if path.stat().st_size]
        # A killed agent leaves its own log empty, but its ranks may have written to their logs.
        logs = logs or [path for path in log_dir.glob("rank_*.log") if path.stat().st_size]
        if not logs:
            return f"no process wrote a log in {log_dir}: none was started, or its agent was killed"
        newest = max(logs, key=lambda path: path.stat().st_mtime)
        why = "no rank recorded a failure, so they did not start or were killed from outside"
        return f"{why}; the end of {newest}:\n{tail_of(newest)}"
    first, *others = failures
    is_local = (log_dir / AGENT_LOG).exists()
    where = f" on {first.node}" if first.node and not is_local else ""
    who = f"rank {first.rank}" if first.rank != NO_RANK else "the agent"
    lines = [f"{who}{where} failed first:", first.text.rstrip()]
    if others:
        lines.append("then rank " + ", ".join(str(failure.rank) for failure in others))
    lines.append(f"logs: {log_dir}")
    return "\n".join(lines)


def tail_of(path: Path, lines: int = _TAIL_LINES) -> str:
    """The last `lines` lines of a log, from its last 64 KiB at most. Empty if the log doesn't exist."""
    if not path.exists():
        return ""
    return "\n".join(_last_bytes(path, _TAIL_BYTES).decode(errors="replace").splitlines()[-lines:])


def _last_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - count))
        return file.read(count)


def _read(path: Path) -> Failure | None:
    return _failure_of(read_json(path))


def _failure_of(value: Any) -> Failure | None:
    """The failure that a rank wrote. None: the file holds something else."""
    if not isinstance(value, dict):
        return None
    try:
        return Failure(
            int(value["rank"]), float(value["time"]), str(value["kind"]), str(value["text"]), str(value.get("node", ""))
        )
    except (KeyError, TypeError, ValueError):
        return None


def _agent_exit_codes(log: Path) -> list[tuple[int, int]]:
    """(rank, exit code) of each failed rank in the summary at the end of torchrun's log.

    Ranks that torchrun ended itself, and ranks whose exit code comes with an outcome, are left out.
    """
    text = _last_bytes(log, _AGENT_SUMMARY_BYTES).decode(errors="replace")
    ended_by_agent = set(_AGENT_KILLED.findall(text))
    failed = [(int(rank), int(code)) for rank, code, pid in _AGENT_FAILURE.findall(text) if pid not in ended_by_agent]
    return sorted((rank, code) for rank, code in failed if code != -signal.SIGTERM and code not in _IN_ORDER)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "?"


def _with_tail(text: str, log_dir: Path, rank: int) -> str:
    tail = tail_of(log_dir / f"rank_{rank}.log")
    return f"{text}; the end of its log:\n{tail}" if tail else text
