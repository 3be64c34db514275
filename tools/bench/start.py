"""Time, CPU and file opens of a launch up to the end of step 1: ranks forked from one process, compared with plain ones.

phalanx bench start [--ranks 1,4,8] [--repeats 3]

Both sides are `phalanx launch quickstart` with a small batch, on data that the measurement makes itself; they differ in
launch.shared_imports. For each number of ranks the two alternate, so that other load on the machine affects both alike. CPU is
that of all processes of the launch. Opens are counted by strace in a launch of their own, and left out if there is no strace.

The last lines are of forked ranks that the launcher starts again (launch.restart.max_local): from SIGKILL of the last rank to the
end of the next attempt's first step, beside the undisturbed start of the same launch. `warm`: a standby has its imports done
(launch.restart.standby_after_s). `cold`: there is none.

Torch-free.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs import own_packages
from launch.watch.processes import STANDBY, name_of
from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.files import last_row
from pretrain.run.folder import RunFolder

SIDES = {"plain": "false", "forked": "true"}
# The standby is there 0 s after the start of an attempt, or never.
RESTARTS = {"cold": "null", "warm": "0"}
# The quickstart's layout is for 4 ranks; with 8 the data axis doubles.
LAYOUTS: dict[int, list[str]] = {1: ["parallel.pipeline=1", "parallel.expert=1"]}
WORDS = [
    "run.steps=2", "schedule.warmup_steps=1", "batch.global_batch_seqs=16", "batch.micro_batch_seqs=2",
    "run.eval_interval_steps=null", "checkpoint.interval_steps=null", "metrics.sinks=[console,jsonl]",
]  # fmt: skip


@dataclass(frozen=True)
class Start:
    """One launch up to the end of step 1, in seconds of the clock and of CPU."""

    wall_s: float
    cpu_s: float


def phalanx(*words: str) -> list[str]:
    return [*own_packages.command(sys.executable, "tools.cli"), *words]


def make_data(folder: Path) -> list[str]:
    """Tokenize 1 MB of the running Python's own text. Returns the words that name the data in a config."""
    tokenizer, train = str(folder / "tokenizer.model"), str(folder / "train")
    corpus = ["--corpus", "embedded", "--max-mb", "1"]
    for words in (
        ["data", "tokenizer", *corpus, "--vocab-size", "1000", "--out", tokenizer],
        ["data", "tokenize", *corpus, "--tokenizer", tokenizer, "--out", train],
    ):
        subprocess.run(phalanx(*words), check=True, stdout=subprocess.DEVNULL)
    return [f"data.tokenizer.path={tokenizer}", f"data.train=[{{path: {train}}}]"]


def launch_words(folder: Path, ranks: int, side: str, data: list[str]) -> list[str]:
    """The command of one launch, whose run folder is `folder`/run."""
    own = [f"launch.processes_per_node={ranks}", f"launch.shared_imports={SIDES[side]}", f"run.dir={folder / 'run'}"]
    return phalanx("launch", "quickstart", *WORDS, *LAYOUTS.get(ranks, []), *data, *own)


def measure(folder: Path, ranks: int, side: str, data: list[str]) -> Start:
    """Launch, and look at the clock and at the launch's processes when step 1 is recorded. Raises RuntimeError if it fails."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    metrics = folder / "run" / "metrics.jsonl"
    with open(folder / "launch.log", "w+") as log:
        begun_s = time.perf_counter()
        process = subprocess.Popen(launch_words(folder, ranks, side, data), stdout=log, stderr=log)
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.005)
        wall_s, cpu_s = time.perf_counter() - begun_s, 0.0
        if process.poll() is None:
            cpu_s = sum(map(cpu_of, [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]))
        if process.wait():
            raise RuntimeError(f"the launch failed:\n{(folder / 'launch.log').read_text()}")
    return Start(wall_s, cpu_s)


def measure_restart(folder: Path, ranks: int, way: str, data: list[str]) -> tuple[float, float]:
    """(start to the end of step 1, SIGKILL of the last rank to the end of the next attempt's first step), in seconds.

    Raises RuntimeError if the launch ends early.
    """
    shutil.rmtree(folder / "run", ignore_errors=True)
    run = RunFolder(folder / "run")
    longer = ["run.steps=10000", "checkpoint.interval_steps=5", "launch.restart.max_local=1"]
    longer.append(f"launch.restart.standby_after_s={RESTARTS[way]}")
    begun_s = time.perf_counter()
    with subprocess.Popen(
        [*launch_words(folder, ranks, "forked", data), *longer], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait(process, lambda: _has_trained(run, 1, 1))
            start_s = time.perf_counter() - begun_s
            _wait(process, lambda: _has_trained(run, 1, 8))
            if way == "warm":
                _wait(process, lambda: any(name_of(child.pid) == STANDBY for child in psutil.Process(process.pid).children()))
            children = psutil.Process(process.pid).children(recursive=True)
            (victim,) = [child for child in children if name_of(child.pid) == f"rank {ranks - 1}"]
            victim.kill()
            killed_s = time.perf_counter()
            _wait(process, lambda: _has_trained(run, 2, 1))
            return start_s, time.perf_counter() - killed_s
        finally:
            process.terminate()


def _has_trained(run: RunFolder, attempt: int, steps: int) -> bool:
    """Has the attempt recorded so many steps of its own?"""
    begun = [row for row in read_events(run) if row["kind"] == EventKind.TRAINING and row["attempt"] == attempt]
    return bool(begun) and (last_row(run.metrics) or {}).get("step", 0) >= begun[0]["step"] + steps - 1


def _wait(process: subprocess.Popen[bytes], is_reached: Callable[[], bool]) -> None:
    while not is_reached():
        if process.poll() is not None:
            raise RuntimeError(f"the launch ended early, with exit code {process.returncode}")
        time.sleep(0.01)


def cpu_of(process: psutil.Process) -> float:
    """CPU seconds of a process and of its ended children; 0 if it has ended meanwhile."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.NoSuchProcess:
        return 0.0


def count_opens(folder: Path, ranks: int, side: str, data: list[str]) -> int:
    """How often the processes of a whole launch open a file. Raises RuntimeError if the launch fails."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    counts = folder / "strace.txt"
    command = ["strace", "-f", "-c", "-e", "trace=openat", "-o", str(counts), *launch_words(folder, ranks, side, data)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    found = re.search(r"(\d+)(?:\s+\d+)?\s+openat$", counts.read_text(), re.MULTILINE)
    if done.returncode or found is None:
        raise RuntimeError(f"the launch under strace failed:\n{done.stderr}")
    return int(found[1])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="phalanx bench start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="1,4,8", help="numbers of ranks, each 1 or a multiple of 4")
    parser.add_argument("--repeats", type=int, default=3, help="launches of each side")
    args = parser.parse_args(argv)
    print(f"{os.cpu_count()} cores; launch to the end of step 1, medians of {args.repeats}; ratio: forked / plain, of pairs")
    print(f"{'ranks':>5}  {'':<10}{'plain':>9}{'forked':>9}{'ratio':>8}")
    with tempfile.TemporaryDirectory(prefix="bench_start_") as name:
        folder = Path(name)
        data = make_data(folder)
        for ranks in map(int, args.ranks.split(",")):
            starts: dict[str, list[Start]] = {side: [] for side in SIDES}
            for _ in range(args.repeats):
                for side, found in starts.items():
                    found.append(measure(folder, ranks, side, data))
            for label, values in {
                "wall, s": {side: [start.wall_s for start in found] for side, found in starts.items()},
                "CPU, s": {side: [start.cpu_s for start in found] for side, found in starts.items()},
            }.items():
                ratio = statistics.median(b / a for a, b in zip(values["plain"], values["forked"], strict=True))
                medians = [statistics.median(values[side]) for side in SIDES]
                print(f"{ranks:>5}  {label:<10}{medians[0]:9.2f}{medians[1]:9.2f}{ratio:8.2f}", flush=True)
            if shutil.which("strace"):
                opens = {side: count_opens(folder, ranks, side, data) for side in SIDES}
                print(f"{ranks:>5}  {'opens':<10}{opens['plain']:>9}{opens['forked']:>9}{opens['forked'] / opens['plain']:8.2f}")
            pairs: dict[str, list[tuple[float, float]]] = {way: [] for way in RESTARTS}
            for _ in range(args.repeats):
                for way, measured in pairs.items():
                    measured.append(measure_restart(folder, ranks, way, data))
            # A standby imports beside the start of its launch. The starts without it are undisturbed.
            starts_s = [start_s for start_s, _ in pairs["cold"]]
            for way, measured in pairs.items():
                ratio = statistics.median(after / start_s for start_s, (_, after) in zip(starts_s, measured, strict=True))
                restart_s, start_s = statistics.median(after for _, after in measured), statistics.median(starts_s)
                told = f"SIGKILL to the next step, {way}, {restart_s:.2f} s, undisturbed start {start_s:.2f} s"
                print(f"{ranks:>5}  {told}: ratio {ratio:.2f}", flush=True)
