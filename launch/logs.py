"""A run's logs. In: the run folder. Out: the first failure first, then a rank's log, followed while it grows if asked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO

from configs.errors import ConfigError, Problem
from configs.run_folder import RunFolder, live_holder
from launch.failures import AGENT_LOG, describe, find_failures, tail_of

POLL_S = 0.2


def choose_log_dir(folder: RunFolder, attempt: int | None) -> Path:
    """The logs of `attempt`, or of the newest attempt that has any. Raises ConfigError, naming the attempts that have."""
    known = sorted(path.name for path in (folder.path / "logs").glob("attempt_*") if any(path.iterdir()))
    if attempt is None and known:
        return folder.path / "logs" / known[-1]
    if attempt is not None and folder.log_dir(attempt).name in known:
        return folder.log_dir(attempt)
    rule = "the attempt must have logs; have them: " + (
        ", ".join(known) or "none (ranks started by hand write to their terminal)"
    )
    raise ConfigError(Problem("--attempt", attempt, rule, "choose one of them"))


def choose_log(log_dir: Path, rank: int) -> Path:
    """A rank's log. Raises ConfigError, naming the ranks that have one; torchrun's own log when no rank came to life."""
    path = log_dir / f"rank_{rank}.log"
    if path.exists():
        return path
    ranks = sorted(int(name.stem.removeprefix("rank_")) for name in log_dir.glob("rank_*.log"))
    if not ranks and (log_dir / AGENT_LOG).exists():
        return log_dir / AGENT_LOG
    rule = "the rank must have a log; have one: " + (", ".join(map(str, ranks)) or "none")
    raise ConfigError(Problem("--rank", rank, rule, "choose one of them"))


def show(folder: RunFolder, rank: int, attempt: int | None, follow: bool, out: TextIO) -> None:
    """Print the first failure, if any, and the rank's log; `follow` goes on until the run is over."""
    log_dir = choose_log_dir(folder, attempt)
    path = choose_log(log_dir, rank)
    failures = find_failures(log_dir)
    if failures:
        print(describe(failures, log_dir), file=out)
        print(f"--- {path}", file=out)
    if not follow:
        print(tail_of(path, lines=2000), file=out)
        return
    with open(path, errors="replace") as file:
        while True:
            alive = live_holder(folder) is not None
            out.write(file.read())
            out.flush()
            if not alive:
                return
            time.sleep(POLL_S)
