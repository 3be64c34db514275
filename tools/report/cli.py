"""`phalanx report RUN [RUN …]`: runs as one page for the browser, from their folders' files; nothing of a run is changed.

In: run folders. Out: a self-contained HTML file, or a page on the loopback interface that follows living runs.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from launch.status import require_run_folder
from pretrain.run.files import storage_problem
from pretrain.run.folder import RunFolder
from tools.report.collect import RunReader
from tools.report.page import plotly_script
from tools.report.plan_pages import write_page
from tools.report.serve import serve

# Buckets over all curves of a page: 40 curves of 100,000 steps then take less than 1 MB beside the 4.8 MB of plotly.
ROOM = 26_000
NAME = "report.html"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phalanx report",
        description="Runs as one HTML page: state, curves, experts, attempts, layout, config; several runs are compared.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument("--out", metavar="FILE", help=f"the page (default: RUN/{NAME}; of several runs: {NAME} here)")
    parser.add_argument(
        "--serve", metavar="PORT", nargs="?", const=0, type=int,
        help="show it at http://127.0.0.1:PORT and follow living runs, until Ctrl-C (default: a free port); no file is written",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout: the page's file, its size, the runs")
    return parser


def main(argv: list[str]) -> int:
    """Returns the exit code. Raises ConfigError for bad input."""
    args = _parser().parse_args(argv)
    if args.serve is not None and (args.out or args.json):
        given = "--out" if args.out else "--json"
        raise ConfigError(Problem("--serve", f"with {given}", "a served page is no file", f"leave out --serve or {given}"))
    plotly_script()
    readers = RunReaders([require_run_folder(path) for path in args.runs])
    if args.serve is not None:
        return serve(readers.read, readers.title, args.serve)
    document = readers.read()
    out = Path(args.out or (Path(args.runs[0]) / NAME if len(args.runs) == 1 else NAME))
    size = write_page(out, document, readers.title)
    if args.json:
        statuses = [run["status"] for run in document["runs"]]
        print(json.dumps({"out": str(out), "bytes": size, "runs": statuses}))
    else:
        print(f"{out}  ({size / 1e6:.1f} MB); open it in a browser")
    return 0


class RunReaders:
    """The runs of a page."""

    def __init__(self, folders: list[RunFolder]) -> None:
        self._readers = [RunReader(folder) for folder in folders]
        self.title = ", ".join(folder.path.name for folder in folders) + " · Phalanx"

    def read(self) -> dict[str, Any]:
        """The page's document. Raises ConfigError when a file of a run can't be read."""
        runs = []
        for reader in self._readers:
            try:
                runs.append(reader.read(ROOM // len(self._readers)))
            except OSError as error:
                raise ConfigError(storage_problem("RUN", reader.folder.path, error)) from error
            for damage in runs[-1]["status"]["damage"]:
                print(f"note: {reader.folder.path}: {damage}", file=sys.stderr)
        return {"kind": "runs", "made": time.time(), "runs": runs}
