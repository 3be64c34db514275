"""Collects the facts of one node: python -m launch.doctor.node --request JSON. A Slurm task of each node runs it.

The facts go to nodes/NAME.json in the check-up's folder. If that folder cannot be written on this node, the exit code is 1
and stderr has one line.

Torch-free.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.doctor.node_facts import node_facts
from launch.doctor.request import NODES, CheckupRequest
from pretrain.run.files import write_json
from pretrain.run.process import node_name


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.node", description="Writes the facts of this node.")
    parser.add_argument(
        "--request", type=CheckupRequest.from_json, required=True, help="a CheckupRequest as JSON (launch/doctor/request.py)"
    )
    request: CheckupRequest = parser.parse_args(list(argv)).request
    try:
        write_node_facts(request, node_name(os.environ))
    except OSError as error:
        print(f"can't write into the run folder ({error.strerror or error}: {error.filename or request.folder})", file=sys.stderr)
        return 1
    return 0


def write_node_facts(request: CheckupRequest, node: str) -> None:
    """Collect the facts of `node` and write them. Raises OSError if the folder is missing or cannot be written."""
    write_json(Path(request.folder) / NODES / f"{node}.json", node_facts(request, node))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
