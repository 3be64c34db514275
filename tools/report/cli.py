"""`phalanx report RUN [RUN …]`: runs as one page for the browser, from their folders' files; nothing of a run is changed.

In: run folders. Out: a self-contained HTML file, or a page on the loopback interface that follows living runs.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem, json_value
from launch.status import require_run_folder
from pretrain.run.files import storage_problem
from pretrain.run.folder import RunFolder
from tools.ladder.ladder_file import Ladder, read_ladder
from tools.ladder.names import is_ladder
from tools.report.collect import RunReader
from tools.report.ladder import LadderReader
from tools.report.page import plotly_script
from tools.report.plan_pages import write_page
from tools.report.serve import serve

# Buckets over all curves of a page: 40 curves of 100,000 steps then take less than 1 MB beside the 4.8 MB of plotly.
ROOM = 26_000
NAME = "report.html"
TITLE = " · Phalanx"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phalanx report",
        description="Runs as one HTML page: state, curves, experts, attempts, layout, config; several runs are compared.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or one ladder: its file or its folder")
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
    readers = _readers(args.runs)
    if args.serve is not None:
        return serve(readers.read, readers.title, args.serve)
    document = readers.read()
    out = Path(args.out or readers.place)
    size = write_page(out, document, readers.title)
    if args.json:
        statuses = [run["status"] for run in document["runs"]]
        print(json.dumps({"out": str(out), "bytes": size, "runs": statuses}))
    else:
        print(f"{out}  ({size / 1e6:.1f} MB); open it in a browser")
    return 0


class RunReaders:
    """The runs of a page. `title` of the page; `place`: where the page is written if nothing else is said."""

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self._readers = [RunReader(folder) for folder in folders]
        self.title = ", ".join(folder.path.name for folder in folders) + TITLE
        self.place = folders[0].path / NAME if len(folders) == 1 else Path(NAME)

    def read(self) -> dict[str, Any]:
        """The page's document. Raises ConfigError when a file of a run can't be read."""
        return _document(self._readers)


class LadderReaders:
    """A ladder and its runs. Each read sees the points that have begun by then."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = LadderReader(ladder)
        self._readers: dict[str, RunReader] = {}
        self.title = ladder.name + TITLE
        self.place = ladder.folder / NAME if ladder.folder.is_dir() else Path(NAME)

    def read(self) -> dict[str, Any]:
        """The page's document. Raises ConfigError when a file of a run can't be read."""
        found = self._ladder.read()
        for point in self._ladder.begun():
            if point.name not in self._readers:
                self._readers[point.name] = RunReader(RunFolder(self._ladder.ladder.run_dir(point)))
        return _document(list(self._readers.values())) | {"ladder": json_value(found)}


def _readers(names: Sequence[str]) -> RunReaders | LadderReaders:
    ladders = [name for name in names if is_ladder(name)]
    if not ladders:
        return RunReaders([require_run_folder(path) for path in names])
    if len(names) > 1:
        fix = "name it alone; the folders of its runs can be compared with other runs"
        raise ConfigError(Problem("RUN", ladders[0], "a ladder has a page of its own", fix))
    return LadderReaders(read_ladder(ladders[0]))


def _document(readers: Sequence[RunReader]) -> dict[str, Any]:
    runs = []
    for reader in readers:
        try:
            runs.append(reader.read(ROOM // len(readers)))
        except OSError as error:
            raise ConfigError(storage_problem("RUN", reader.folder.path, error)) from error
        for damage in runs[-1]["status"]["damage"]:
            print(f"note: {reader.folder.path}: {damage}", file=sys.stderr)
    return {"kind": "runs", "made": time.time(), "runs": runs}
