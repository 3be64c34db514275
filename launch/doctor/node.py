"""One node looks at itself: python -m launch.doctor.node --request JSON. What a Slurm task runs in each node's own Python.

Its facts go to nodes/NAME.json in the check-up's folder. Exit code 1 and a line on stderr: that folder can't be written here.

Torch-free.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.doctor.facts import node_facts
from launch.doctor.request import NODES, Request
from pretrain.run.files import write_json
from pretrain.run.process import node_name


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.node", description="A node's facts, as JSON in a file.")
    parser.add_argument("--request", type=Request.from_json, required=True, help="launch/doctor/request.py's Request as JSON")
    request: Request = parser.parse_args(list(argv)).request
    try:
        look(request, node_name(os.environ))
    except OSError as error:
        print(f"can't write into the run folder ({error.strerror or error}: {error.filename or request.folder})", file=sys.stderr)
        return 1
    return 0


def look(request: Request, node: str) -> None:
    """Collect and write. Raises OSError: the folder isn't there, or takes no file."""
    write_json(Path(request.folder) / NODES / f"{node}.json", node_facts(request, node))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
