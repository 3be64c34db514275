"""Which rank failed first. In: an attempt's log folder. Out: the failure to show first, and the others behind it.

Ranks leave rank_N.failure.json with the time of their exception (pretrain/rank/process_setup.py). A rank that was killed, or
crashed in C code, leaves none, but torchrun's own log has its exit code: such a rank comes first, for the others then
only report that their partner is gone. What torchrun itself ended (SIGTERM, after 30 s SIGKILL) is no cause.

Torch-free.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from pretrain.run.files import iterate_lines, read_json
from pretrain.run.folder import EXIT_CODE

# torchrun's own log is torchrun.log, or NODE.torchrun.log over several nodes. Gathered logs (launch/watch/gathered_logs.py)
# are NODE.log and NODE.failures.jsonl.
AGENT_LOG = "torchrun.log"
NODE_LOG = ".log"
GATHERED = ".failures.jsonl"
# The rank of a failure before there were ranks: the node's own.
NO_RANK = -1
_TAIL_LINES = 30
# torchrun takes every exit code but 0 for a failure; these come with an outcome.
_IN_ORDER = frozenset(EXIT_CODE[state] for state in ("preempted", "stopped", "diverged"))
# torchrun's summary, one block a failed rank: "rank : 2 (local_rank: 2)", then "exitcode : -9 (pid: 17)".
_AGENT_FAILURE = re.compile(r"^\s*rank\s*:\s*(\d+) .*\n\s*exitcode\s*:\s*(-?\d+) \(pid: (\d+)\)", re.MULTILINE)
_AGENT_KILLED = re.compile(r"Unable to shutdown process (\d+)")


@dataclass(frozen=True)
class Failure:
    """One rank's end. `time` in seconds since the epoch, 0: unknown. `kind`: bad_input, exception, killed or exit.

    `node`: its machine's name; empty: not known.
    """

    rank: int
    time: float
    kind: str
    text: str
    node: str = ""


def find_failures(log_dir: Path) -> list[Failure]:
    """All failed ranks, the first cause first. Also those that the nodes of a large run gathered."""
    written = {failure.rank: failure for path in log_dir.glob("rank_*.failure.json") if (failure := _read(path))}
    gathered = (row for path in log_dir.glob(f"*{GATHERED}") for _, row in iterate_lines(path) if row is not None)
    found = [*written.values(), *(Failure(**row) for row in gathered)]
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
    order = {"killed": 0, "exit": 2}
    return sorted(found, key=lambda failure: (order.get(failure.kind, 1), failure.time))


def agent_logs(log_dir: Path) -> list[Path]:
    """torchrun's own logs: torchrun.log, or one a node."""
    return sorted(log_dir.glob(f"*{AGENT_LOG}"))


def describe(failures: list[Failure], log_dir: Path) -> str:
    """The first failure in full, the others in a line, and where to read on."""
    if not failures:
        logs = [path for path in agent_logs(log_dir) or log_dir.glob(f"*{NODE_LOG}") if path.stat().st_size]
        # An agent that was killed leaves an empty log of its own; its ranks may have written.
        logs = logs or [path for path in log_dir.glob("rank_*.log") if path.stat().st_size]
        if not logs:
            return f"no process wrote a log in {log_dir}: none was started, or its agent was killed"
        newest = max(logs, key=lambda path: path.stat().st_mtime)
        return f"no rank recorded a failure, so they were killed from outside; the end of {newest}:\n{tail_of(newest)}"
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
    """The last lines of a log; empty when there is none."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def _read(path: Path) -> Failure | None:
    value = read_json(path)
    if not isinstance(value, dict):
        return None
    return Failure(int(value["rank"]), float(value["time"]), str(value["kind"]), str(value["text"]), str(value.get("node", "")))


def _agent_exit_codes(log: Path) -> list[tuple[int, int]]:
    """(rank, exit code) as torchrun lists them at its end, without those that it ended itself or that ended in good order."""
    text = log.read_text(errors="replace")
    ended_by_agent = set(_AGENT_KILLED.findall(text))
    failed = [(int(rank), int(code)) for rank, code, pid in _AGENT_FAILURE.findall(text) if pid not in ended_by_agent]
    return sorted((rank, code) for rank, code in failed if code != -signal.SIGTERM and code not in _IN_ORDER)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "?"


def _with_tail(text: str, log_dir: Path, rank: int) -> str:
    tail = tail_of(log_dir / f"rank_{rank}.log")
    return f"{text}; the end of its log:\n{tail}" if tail else text
