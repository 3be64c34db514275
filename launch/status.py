"""How a run stands, from its folder's files alone. In: the run folder. Out: `Status`, as text or JSON.

Works while the run trains, from any host that sees the folder, and long after.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.files import last_row, parse_line
from configs.load import from_yaml_text
from configs.run_folder import RunFolder, is_run_folder, live_holder
from configs.units import duration
from parallel.batch import steps_of

_TAIL_BYTES = 1 << 18
_ETA_STEPS = 20


@dataclass(frozen=True)
class Status:
    """`state`: running, starting, an outcome's state, or died (the last attempt ended without an outcome). None: not known."""

    run_dir: str
    state: str
    why: str
    attempt: int
    step: int
    total_steps: int | None
    loss: float | None
    val_loss: float | None
    tokens: int | None
    tokens_per_s: float | None
    step_time_s: float | None
    eta_s: float | None
    last_row_age_s: float | None
    holder: str | None
    done: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_run_folder(path: str) -> RunFolder:
    """The folder of a run that has begun. Raises ConfigError."""
    folder = RunFolder(Path(path))
    if is_run_folder(folder) or folder.claimed_attempts():
        return folder
    found = "nothing is there" if not folder.path.exists() else "it has neither config.yaml nor events.jsonl"
    runs = (
        sorted(str(config.parent) for config in folder.path.parent.glob("*/config.yaml")) if folder.path.parent.is_dir() else []
    )
    fix = (
        f"run folders beside it: {', '.join(runs[:5])}"
        if runs
        else "name the folder that phalanx launch made (run.dir, or runs/NAME)"
    )
    raise ConfigError(Problem("RUN_DIR", path, f"must be a run folder; {found}", fix))


def read_status(folder: RunFolder, now_s: float | None = None) -> Status:
    """`now_s`: seconds since the epoch, for the age of the last row."""
    now_s = time.time() if now_s is None else now_s
    attempt = folder.last_attempt()
    rows = recent_rows(folder.metrics)
    row = rows[-1] if rows else {}
    holder = live_holder(folder)
    state, why = _state(folder, attempt, holder is not None, row)
    total_steps = _total_steps(folder)
    times_s = [r["step_time_s"] for r in rows[-_ETA_STEPS:] if isinstance(r.get("step_time_s"), (int, float))]
    step_time_s = statistics.median(times_s) if times_s else None
    step = row.get("step", 0)
    left = max(0, total_steps - step) if total_steps is not None else None
    return Status(
        run_dir=str(folder.path),
        state=state,
        why=why,
        attempt=attempt,
        step=step,
        total_steps=total_steps,
        loss=row.get("loss"),
        val_loss=next((r["val_loss"] for r in reversed(rows) if r.get("val_loss") is not None), None),
        tokens=row.get("tokens"),
        tokens_per_s=row.get("tokens_per_s"),
        step_time_s=step_time_s,
        eta_s=left * step_time_s if left is not None and step_time_s is not None and state == "running" else None,
        last_row_age_s=max(0.0, now_s - folder.metrics.stat().st_mtime) if rows else None,
        holder=holder.describe() if holder else None,
        done=folder.done.exists(),
    )


def recent_rows(metrics: Path) -> list[dict[str, Any]]:
    """The record's last rows, as many as fit into 256 KiB."""
    if not metrics.exists():
        return []
    with open(metrics, "rb") as file:
        size = metrics.stat().st_size
        file.seek(max(0, size - _TAIL_BYTES))
        lines = deque(file.read().split(b"\n"))
    lines.pop()
    if size > _TAIL_BYTES:
        lines.popleft()
    return [row for line in lines if (row := parse_line(line)) is not None and isinstance(row.get("step"), int)]


def describe(status: Status) -> str:
    """A few aligned lines for people."""
    steps = f"{status.step}/{status.total_steps}" if status.total_steps is not None else str(status.step)
    lines = [
        ("run", status.run_dir),
        ("state", status.state + (f": {status.why}" if status.why else "")),
        ("attempt", f"{status.attempt}" + (f", held by {status.holder}" if status.holder else "")),
        ("step", steps + (f", eta {duration(status.eta_s)}" if status.eta_s is not None else "")),
    ]
    numbers = [
        ("loss", status.loss, "{:.4f}"),
        ("val loss", status.val_loss, "{:.4f}"),
        ("tokens", status.tokens, "{:,}"),
        ("tokens/s", status.tokens_per_s, "{:,.0f}"),
        ("s/step", status.step_time_s, "{:.3f}"),
    ]
    lines += [(name, text.format(value)) for name, value, text in numbers if value is not None]
    if status.last_row_age_s is not None and status.state == "running":
        lines.append(("last row", f"{duration(status.last_row_age_s)} ago"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def as_json(status: Status) -> str:
    return json.dumps(status.as_dict(), indent=2)


def _state(folder: RunFolder, attempt: int, held: bool, row: dict[str, Any]) -> tuple[str, str]:
    if held:
        return ("running" if row else "starting"), ""
    outcome = folder.read_outcome()
    if outcome is not None and outcome.attempt == attempt:
        return outcome.state, outcome.why
    if attempt == 0:
        return "starting", "no attempt has begun yet; phalanx logs shows why when it lasts"
    event = last_row(folder.events)
    after = f"; its last event was {event['kind']}" if event is not None and "kind" in event else ""
    return "died", f"attempt {attempt} ended without an outcome{after}"


def _total_steps(folder: RunFolder) -> int | None:
    if not folder.config.exists():
        return None
    try:
        config = from_yaml_text(folder.config.read_text(), str(folder.config))
    except ConfigError:
        # Written by another version of the schema: the rest of the status is still good.
        return None
    return steps_of(config) if config.run.steps is not None or config.run.tokens is not None else None
