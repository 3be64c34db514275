"""Prints a run's logs. In: the run folder. Out: the first failure, then the log of one rank or of all ranks.

The log of one rank can be followed while the run is live.

Torch-free.
"""

from __future__ import annotations

import codecs
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from configs.errors import ConfigError, Problem
from launch.live_process import attempt_is_live
from launch.slurm.lifecycle import ENDED, QUEUED, RESTARTING, RUNNING, read_lifecycle
from launch.status import read_status
from launch.watch.failures import NODE_LOG, agent_logs, describe, find_failures, tail_of
from launch.watch.heartbeats import NodeReport, read_reports
from pretrain.run.folder import RunFolder

POLL_S = 0.2
QUEUE_POLL_S = 2.0
# How often Slurm is asked whether a job that has no log yet, or no longer writes one, is still there.
SLURM_POLL_S = 10.0
# A following reader begins so far before the end of a log. Logs are read in blocks of this size at most.
_TAIL_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20
_SHOWN_LINES = 2000
# `--rank all` shows this many last lines of each rank's log and of each node's gathered log.
_MERGED_LINES = 200
# The phases of a Slurm run that another attempt may follow.
_GOING_ON = (QUEUED, RUNNING, ENDED, RESTARTING)


def choose_log_dir(folder: RunFolder, attempt: int | None) -> Path:
    """The logs of `attempt`, or of the newest attempt that has any. Raises ConfigError if there are none."""
    known = sorted(path.name for path in (folder.path / "logs").glob("attempt_*") if any(path.iterdir()))
    if attempt is None and known:
        return folder.path / "logs" / known[-1]
    if attempt is not None and folder.log_dir(attempt).name in known:
        return folder.log_dir(attempt)
    rule = "the attempt must have logs; have them: " + (
        ", ".join(known) or "none (ranks started by hand write to their terminal)"
    )
    raise ConfigError(Problem("--attempt", attempt, rule, "choose one of them"))


@dataclass(frozen=True)
class RankLog:
    """Where the lines of a rank are: all lines of `path`, or the lines of a node's log `path` that begin with `origin`."""

    path: Path
    origin: bytes = b""

    def lines_of(self, text: bytes) -> bytes:
        """The lines of this rank in `text`, without their origin. `text` consists of whole lines."""
        if not self.origin:
            return text
        lines = text.splitlines(keepends=True)
        return b"".join(line.removeprefix(self.origin) for line in lines if line.startswith(self.origin))


def choose_log(log_dir: Path, rank: int, reports: Sequence[NodeReport] = ()) -> RankLog:
    """The log of a rank: its own file, or its lines in the log of its node. If no rank started, the log of torchrun.

    `reports` say on which node a rank ran, so that the logs of other nodes need not be searched. Raises ConfigError if the
    rank has no log.
    """
    path = log_dir / f"rank_{rank}.log"
    if path.exists():
        return RankLog(path)
    origin = b"[rank %d] " % rank
    hosts = [report.host for report in reports if any(state.rank == rank for state in report.ranks)]
    gathered = _gathered_logs(log_dir)
    likely = [path for path in gathered if path.name.removesuffix(NODE_LOG) in hosts] or gathered
    if found := next((path for path in likely if _has_line(path, origin)), None):
        return RankLog(found, origin)
    ranks = sorted(int(name.stem.removeprefix("rank_")) for name in log_dir.glob("rank_*.log"))
    if not ranks and (logs := agent_logs(log_dir)):
        return RankLog(logs[0])
    known = ", ".join(map(str, ranks)) or ", ".join(path.name for path in gathered[:5]) or "none"
    raise ConfigError(Problem("--rank", rank, f"the rank must have a log; have one: {known}", "choose one of them"))


def print_rank_log(folder: RunFolder, rank: int, attempt: int | None, follow: bool, out: TextIO, notes: TextIO) -> None:
    """Print the first failure, if any, and the end of the rank's log. Raises ConfigError if the attempt or the rank has no log.

    With `follow`, new lines are printed until the run is over, and a run that has no log yet is waited for. Without `attempt`,
    later attempts are followed too. `notes` is told what is waited for.
    """
    if follow:
        _wait_for_log(folder, rank, attempt, notes)
    batch = sorted((folder.path / "logs").glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    if attempt is None and batch and not _has_attempt_logs(folder):
        # No rank started. The output of the batch step and srun is the only log.
        print(f"--- {batch[-1]}\n{tail_of(batch[-1], lines=_SHOWN_LINES)}", file=out)
        return
    log_dir = choose_log_dir(folder, attempt)
    failures = find_failures(log_dir)
    if failures and not (_gathered_logs(log_dir) or agent_logs(log_dir) or any(log_dir.glob("rank_*.log"))):
        # The agents of the nodes failed before they started any rank.
        print(describe(failures, log_dir), file=out)
        return
    log = choose_log(log_dir, rank, read_reports(folder.path / "launch" / log_dir.name))
    if failures:
        print(describe(failures, log_dir), file=out)
        print(f"--- {log.path}", file=out)
    if not follow:
        print(_tail(log), file=out)
        return
    while True:
        _follow(folder, log, out)
        later = _next_log_dir(folder, log_dir, notes) if attempt is None else None
        if later is None:
            return
        log_dir = later
        log = choose_log(log_dir, rank, read_reports(folder.path / "launch" / log_dir.name))
        print(f"--- {log.path}", file=out)


def _has_attempt_logs(folder: RunFolder) -> bool:
    return any((folder.path / "logs").glob("attempt_*/*"))


def _wait_for_log(folder: RunFolder, rank: int, attempt: int | None, notes: TextIO) -> None:
    """Wait until the rank has a log, or until the run is over without one. torchrun's log comes before those of the ranks."""
    told = ""

    def has_log() -> bool:
        names = [path.name for path in (folder.path / "logs").glob("attempt_*")]
        newest = max([*names, *(folder.log_dir(number).name for number in folder.claimed_attempts())], default="")
        log_dir = folder.path / "logs" / (folder.log_dir(attempt).name if attempt is not None else newest)
        return (log_dir / f"rank_{rank}.log").exists() or bool(_gathered_logs(log_dir))

    while not has_log():
        status = read_status(folder)
        if not status.live:
            return
        text = f"no log yet: the run is {status.state}" + (f": {status.why}" if status.why else "")
        if text != told:
            print(text, file=notes, flush=True)
            told = text
        _sleep_until(has_log)


def _sleep_until(arrived: Callable[[], bool]) -> None:
    """Sleep for SLURM_POLL_S, or until `arrived` says so."""
    deadline = time.monotonic() + SLURM_POLL_S
    while not arrived() and time.monotonic() < deadline:
        time.sleep(QUEUE_POLL_S)


def print_all_logs(folder: RunFolder, attempt: int | None, out: TextIO) -> None:
    """Print the first failure, if any, then the last lines of every rank, each line with its origin.

    Raises ConfigError if the attempt has no logs.
    """
    log_dir = choose_log_dir(folder, attempt)
    if failures := find_failures(log_dir):
        print(describe(failures, log_dir), file=out)
    own = {int(path.stem.removeprefix("rank_")): path for path in log_dir.glob("rank_*.log")}
    for rank, path in sorted(own.items()):
        for line in tail_of(path, lines=_MERGED_LINES).splitlines():
            print(f"[rank {rank}] {line}", file=out)
    for path in _gathered_logs(log_dir):
        # The lines of a gathered log already name their ranks.
        print(f"--- {path.name}\n{tail_of(path, lines=_MERGED_LINES)}", file=out)


def _follow(folder: RunFolder, log: RankLog, out: TextIO) -> None:
    """Print the last lines of the log, then its new lines until the attempt is over."""
    with open(log.path, "rb") as file:
        if log.origin:
            # The lines of one rank are anywhere in a gathered log: it is read once, from its beginning.
            print(_last_lines(file, log), file=out)
        elif (size := file.seek(0, os.SEEK_END)) > _TAIL_BYTES:
            file.seek(size - _TAIL_BYTES)
            file.readline(_TAIL_BYTES)
        else:
            file.seek(0)
        # A block may end within a character.
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        while True:
            alive = attempt_is_live(folder)
            while text := _next_block(file, log):
                out.write(decode(log.lines_of(text)))
            out.flush()
            if not alive:
                return
            time.sleep(POLL_S)


def _next_log_dir(folder: RunFolder, log_dir: Path, notes: TextIO) -> Path | None:
    """Wait for the next attempt of a Slurm run and return its logs. None if the run is over."""

    def newest() -> Path | None:
        found = choose_log_dir(folder, None)
        return found if found != log_dir and any(found.glob("rank_*.log")) else None

    told = False
    while (later := newest()) is None:
        phase = read_lifecycle(folder).phase
        if phase not in _GOING_ON or not read_status(folder).live:
            return None
        if not told:
            print("the attempt is over; waiting for the next one", file=notes, flush=True)
            told = True
        _sleep_until(lambda: newest() is not None or read_lifecycle(folder).phase not in _GOING_ON)
    return later


def _gathered_logs(log_dir: Path) -> list[Path]:
    own = (path.name for path in [*log_dir.glob("rank_*.log"), *agent_logs(log_dir)])
    return sorted(set(log_dir.glob(f"*{NODE_LOG}")) - {log_dir / name for name in own})


def _has_line(path: Path, origin: bytes) -> bool:
    with open(path, "rb") as file:
        return any(line.startswith(origin) for line in _pieces(file))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file. A line without end comes in blocks, so that no line needs the memory of a whole log."""
    return iter(lambda: file.readline(_BLOCK_BYTES), b"")


def _tail(log: RankLog) -> str:
    """The rank's last lines."""
    if not log.origin:
        return tail_of(log.path, lines=_SHOWN_LINES)
    with open(log.path, "rb") as file:
        return _last_lines(file, log)


def _last_lines(file: BinaryIO, log: RankLog) -> str:
    """The rank's last lines in a gathered log, which is read to its end."""
    last = deque((line for line in _pieces(file) if line.startswith(log.origin)), maxlen=_SHOWN_LINES)
    return log.lines_of(b"".join(last)).decode(errors="replace").rstrip("\n")


def _next_block(file: BinaryIO, log: RankLog) -> bytes:
    """What was appended since the last call, at most a block. An unfinished line of a gathered log is left for the next call."""
    text = file.read(_BLOCK_BYTES)
    whole = text.rfind(b"\n") + 1
    if log.origin and (whole or len(text) < _BLOCK_BYTES):
        file.seek(whole - len(text), os.SEEK_CUR)
        text = text[:whole]
    return text
