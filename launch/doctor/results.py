"""Reads the results of a check-up from its folder: the facts of each node, why a node is silent, the network measurements.

Only the standard library and light modules are imported, because the batch step runs it with the host's Python.

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

from launch.doctor.node_checks import can_join_network_probe
from launch.doctor.request import HOSTNAMES, NETWORK, NETWORK_LOG, NODES, NODES_LOG, CheckupRequest
from pretrain.run.files import read_json

_TAIL_BYTES = 1 << 16
# The line that explains an error best. A Python traceback ends with the first form.
_ERROR = re.compile(r"(error|exception)\b.*?:|No such file|not found|Permission denied|Killed|can't write", re.IGNORECASE)
_ENDED = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<task>[\d,-]+): (?P<how>.*)")
# Closing messages of srun and torchrun, which only repeat earlier errors.
_NOISE = re.compile(
    r"Exited with exit code|task \d+: Killed|STEP .* ON "
    r"|ChildFailedError|error_file|traceback :|Failures:|Root Cause|exitcode|Sending process"
)


@dataclass(frozen=True)
class CheckupResults:
    """What the check-up left behind.

    `silent` maps a node without facts to the reason. `network` is None with an empty `network_error` if no measurement was
    requested. `broke` maps the one node whose ranks ended before the others to their error message. It is empty if all ranks
    finished or several nodes ended at once.
    """

    facts: dict[str, dict[str, Any]]
    silent: dict[str, str]
    network: dict[str, Any] | None
    network_error: str
    broke: dict[str, str]


def read_results(folder: Path, request: CheckupRequest, expected: Sequence[str]) -> CheckupResults:
    """`expected` are the nodes of the job, in the order of their tasks."""
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
    return CheckupResults(facts, silent, network, error, broke)


def read_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """The facts of each node that has written some, by the node's name."""
    found = [read_json(path) for path in sorted((folder / NODES).glob("*.json"))]
    return {value["node"]: value for value in found if isinstance(value, dict)}


def ready_nodes(folder: Path, request: CheckupRequest, expected: Sequence[str]) -> list[str]:
    """The nodes whose ranks can be started for the network measurement."""
    facts = read_facts(folder)
    return [node for node in expected if node in facts and can_join_network_probe(facts[node], request)]


def read_hostnames(folder: Path) -> list[str]:
    """The nodes of the job, as the batch step wrote them. Empty if the job has not begun."""
    return _lines(folder / HOSTNAMES)


def _why_silent(log: Sequence[str], task: int, node: str) -> str:
    """The task's own error message (srun --label prefixes each line with the task number), or else srun's message on the node."""
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
    """The node whose task ended first. srun reports ends in order, and the first end causes the others."""
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
    """The non-empty lines at the end of the file, or none if there is no file."""
    if not file.exists():
        return []
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        text = opened.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def main(argv: Sequence[str]) -> int:
    """Print the nodes that can take part in the network measurement, separated by commas. Exit code 1 if there are none."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.results", description="Prints the measurable nodes.")
    parser.add_argument(
        "--request", type=CheckupRequest.from_json, required=True, help="a CheckupRequest as JSON (launch/doctor/request.py)"
    )
    request: CheckupRequest = parser.parse_args(list(argv)).request
    folder = Path(request.folder)
    ready = ready_nodes(folder, request, read_hostnames(folder))
    print(",".join(ready))
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
