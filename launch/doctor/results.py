"""What a check-up has left in its folder. In: the folder. Out: facts a node, why a node is silent, the network's figures.

Standard library and light modules only: the batch step reads it with the host's Python.

Torch-free.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.doctor.checks import can_meet
from launch.doctor.request import HOSTNAMES, NETWORK, NETWORK_LOG, NODES, NODES_LOG, Request
from pretrain.run.files import read_json

_TAIL_BYTES = 1 << 16
# What a log's reader looks for first; a Python traceback ends with the first form.
_ERROR = re.compile(r"(error|exception)\b.*?:|No such file|not found|Permission denied|Killed|can't write", re.IGNORECASE)
_ENDED = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<task>[\d,-]+): (?P<how>.*)")
# srun and torchrun on their way out, about what others have said already.
_NOISE = re.compile(
    r"Exited with exit code|task \d+: Killed|STEP .* ON "
    r"|ChildFailedError|error_file|traceback :|Failures:|Root Cause|exitcode|Sending process"
)


@dataclass(frozen=True)
class Results:
    """`silent`: node → why there are no facts of it. `network` None and `network_error` empty: not asked for.

    `broke`: the one node whose ranks ended before the others', with their words; empty: all measured, or several ended at once.
    """

    facts: dict[str, dict[str, Any]]
    silent: dict[str, str]
    network: dict[str, Any] | None
    network_error: str
    broke: dict[str, str]


def read_results(folder: Path, request: Request, expected: Sequence[str]) -> Results:
    """`expected`: the nodes that were to answer, in the order of their tasks."""
    facts = read_facts(folder)
    log = _lines(folder / NODES_LOG)
    silent = {node: _why_silent(log, task, node) for task, node in enumerate(expected) if node not in facts}
    network = read_json(folder / NETWORK)
    network = network if isinstance(network, dict) else None
    error, broke = "", {}
    asked = len(facts) * request.processes_per_node > 1 and request.sizes.network_mib
    if asked and not (network and network.get("done")):
        ready = ready_nodes(folder, request, expected)
        error = _why_no_network(folder, network) if ready else "not measured: no node can start ranks"
        broke = _who_broke(_lines(folder / NETWORK_LOG), facts)
    return Results(facts, silent, network, error, broke)


def read_facts(folder: Path) -> dict[str, dict[str, Any]]:
    found = [read_json(path) for path in sorted((folder / NODES).glob("*.json"))]
    return {value["node"]: value for value in found if isinstance(value, dict)}


def ready_nodes(folder: Path, request: Request, expected: Sequence[str]) -> list[str]:
    """Those whose ranks can be started to measure the network."""
    facts = read_facts(folder)
    return [node for node in expected if node in facts and can_meet(facts[node], request)]


def read_hostnames(folder: Path) -> list[str]:
    """The nodes of the job, as its batch step was told them; none: it has not begun."""
    return _lines(folder / HOSTNAMES)


def _why_silent(log: Sequence[str], task: int, node: str) -> str:
    """The task's own words: srun --label puts its number before each line. Else what srun says of the node."""
    own = [line.partition(":")[2].strip() for line in log if re.match(rf"\s*{task}:", line)]
    about = [line for line in log if re.search(rf"\b{re.escape(node)}\b", line)]
    own = [re.sub(r"^slurmstepd[^ ]*: (error: )?", "", line) for line in own]
    late = next((match[1] for line in log if (match := re.search(r"First task exited (\d+s) ago", line))), "")
    given_up = f"it gave no answer within {late} of the first node's" if late else ""
    return _first_error(own) or _last(own) or _first_error(about) or given_up or _last(about) or "it gave no answer"


def _why_no_network(folder: Path, network: dict[str, Any] | None) -> str:
    said = _first_error([re.sub(r"^\s*\d+:\s*", "", line) for line in _lines(folder / NETWORK_LOG)])
    reached = [name for name in ("clocks", "compute", "inside", "between", "all") if network and name in network]
    how_far = f"it came as far as {reached[-1]}" if reached else "the ranks did not meet"
    return f"{how_far}: {said}" if said else f"{how_far} in time; see {folder / NETWORK_LOG}"


def _who_broke(log: Sequence[str], facts: Mapping[str, Any]) -> dict[str, str]:
    """srun tells who ended, in that order: the first one's end is the cause of the others'."""
    first = next((match for line in log if (match := _ENDED.search(line))), None)
    if first is None or first["node"] not in facts:
        return {}
    own = [line.partition(":")[2].strip() for line in log if re.match(rf"\s*{first['task']}:", line)]
    return {first["node"]: _first_error(own) or first["how"]}


def _first_error(lines: Sequence[str]) -> str:
    return next((line.strip()[:300] for line in lines if _ERROR.search(line) and not _NOISE.search(line)), "")


def _last(lines: Sequence[str]) -> str:
    return lines[-1].strip()[:300] if lines else ""


def _lines(file: Path) -> list[str]:
    """The lines that aren't empty, of the file's end; none without the file."""
    if not file.exists():
        return []
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        text = opened.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def main(argv: Sequence[str]) -> int:
    """For the batch script: the nodes that can meet, separated by commas. Exit code 1: none can."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.results", description="The nodes that can meet.")
    parser.add_argument("--request", type=Request.from_json, required=True, help="launch/doctor/request.py's Request as JSON")
    request: Request = parser.parse_args(list(argv)).request
    folder = Path(request.folder)
    ready = ready_nodes(folder, request, read_hostnames(folder))
    print(",".join(ready))
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
