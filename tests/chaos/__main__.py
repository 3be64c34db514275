"""The campaign's command. Any case can be run again alone: --where slurm --seed 17 --kills 1."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from pretrain.run.files import write_json
from tests.chaos.campaign import Lane, Row, make_data
from tests.chaos.plan import LOCAL, SLURM, plan
from tests.run.world import ROOT
from tests.slurm.cluster import missing


class Report:
    """The rows of a campaign as JSON, one file for both lanes, each with the commit of the code that ran, if git knows it. A case
    that is in the file is not run again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        self.commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def has(self, where: str, seed: int) -> bool:
        return any((row["where"], row["seed"]) == (where, seed) for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        with self._lock:
            self.rows += [asdict(row) | {"commit": self.commit} for row in rows]
            self.rows.sort(key=lambda row: (row["where"], row["seed"]))
            write_json(self.path, {"rows": self.rows})
        for row in rows:
            place = f"{row.where}{', in place' if row.in_place else ''}, seed {row.seed}"
            print(f"{row.result}: {place}: {row.way}, {row.moment}, step {row.step}, attempt {row.attempt}", flush=True)
        for why in {row.why for row in rows if row.why}:
            print(why, flush=True)


def run_lane(where: str, folder: Path, seed: int, kills: int, report: Report) -> None:
    """Cases from `seed` on until `kills` blows of the lane have come."""
    with Lane(where, folder, report.path.with_suffix(".lost")) as lane:
        came = 0
        while came < kills:
            if not report.has(where, seed):
                rows = lane.run(plan(where, seed))
                report.add(rows)
                came += len(rows)
            seed += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="blows in all; each case is run whole")
    parser.add_argument("--seed", type=int, default=0, help="the first case's; the next ones follow")
    words = "the report, JSON; cases that it has are not run again; the folders of lost runs go beside it"
    parser.add_argument("--out", type=Path, required=True, help=words)
    parser.add_argument("--where", choices=(LOCAL, SLURM), help="default: both, side by side")
    args = parser.parse_args()
    wheres = [args.where] if args.where else [LOCAL, SLURM]
    if why := missing() if SLURM in wheres else "" if os.geteuid() == 0 else "filling a disk needs root":
        print(why, file=sys.stderr)
        return 2
    report = Report(args.out.absolute())
    with tempfile.TemporaryDirectory(prefix="chaos_") as made, ThreadPoolExecutor() as pool:
        folder = Path(made)
        make_data(folder)
        os.chdir(folder)
        lanes = [pool.submit(run_lane, where, folder, args.seed, -(-args.kills // len(wheres)), report) for where in wheres]
        for lane in lanes:
            lane.result()
    lost = [row for row in report.rows if row["result"] == "lost"]
    print(f"{len(report.rows)} kills, {len(lost)} lost: {args.out}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
