"""A status, or a list of runs, as text for people. In: `RunStatus`. Out: lines.

Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from configs.units import duration
from launch.event_words import clock, sentence
from launch.slurm.interruptions import Interruption
from launch.status import RunStatus

_HEAD = ("RUN", "STATE", "STEP", "LOSS", "AGE", "WHY")
_RIGHT = ("STEP", "LOSS", "AGE")
_GAP = "  "
# In characters. A longer name than this is cut where the window has no room, or where it would take the reasons' room.
_LEAST_NAME, _LONG_NAME = 20, 32
_MOST_NODES = 8
TIMES = {
    "steps_s": "in steps",
    "again_s": "in steps done again",
    "startup_s": "start-up",
    "saves_s": "saves",
    "queue_s": "queue",
    "detection_s": "until hangs were seen",
    "other_s": "other",
}


def describe(status: RunStatus, now_s: float | None = None) -> str:
    """A few aligned lines. Times of day are told in the zone of this machine."""
    now_s = time.time() if now_s is None else now_s
    lines = [
        ("run", status.run_dir),
        ("state", status.state + (f": {status.why}" if status.why else "")),
        ("attempt", f"{status.attempt}" + (f", held by {status.holder}" if status.holder else "")),
        ("step", _steps(status) + (f", eta {duration(status.eta_s)}" if status.eta_s is not None else "")),
    ]
    numbers = [
        ("loss", status.loss, "{:.4f}"),
        ("val loss", status.val_loss, "{:.4f}"),
        *((f"val loss {name}", loss, "{:.4f}") for name, loss in status.val_losses.items()),
        ("tokens", status.tokens, "{:,}"),
        ("tokens/s", status.tokens_per_s, "{:,.0f}"),
        ("s/step", status.step_time_s, "{:.3f}"),
    ]
    lines += [(name, text.format(value)) for name, value, text in numbers if value is not None]
    if status.goodput is not None:
        lines.append(("goodput", _goodput_text(status.goodput)))
    if status.wandb is not None:
        lines.append(("W&B", _copy_text(status)))
    if status.job is not None:
        lines.append(("job", _job_text(status.job)))
    if status.nodes:
        more = f", … ({len(status.nodes)})" if len(status.nodes) > _MOST_NODES else ""
        lines.append(("nodes", ", ".join(status.nodes[:_MOST_NODES]) + more))
    if status.last_row_age_s is not None and status.state == "running":
        lines.append(("last row", f"{duration(status.last_row_age_s)} ago"))
    lines += _named("damaged", status.damage)
    lines += _named("interrupted", [str(Interruption(**found)) for found in status.interruptions[-3:]])
    lines += _named("events", [f"{clock(event['time'], now_s)}  {sentence(event)}" for event in status.events])
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {_printable(value)}" for name, value in lines)


def table(runs: Sequence[RunStatus], columns: int | None) -> list[str]:
    """A header and one line for each run, cut to `columns` characters; None: as wide as they are.

    A long name is cut, so that it leaves room for the other columns.
    """
    rows = [_HEAD, *(_row(status) for status in runs)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(_HEAD))]
    if columns:
        room = columns - sum(width + len(_GAP) for width in widths[1:-1]) - len(_GAP) - 1
        widths[0] = min(widths[0], max(_LEAST_NAME, min(room, max(_LONG_NAME, columns // 3))))
        rows = [(_cut(name, widths[0]), *rest) for name, *rest in rows]
    lines = [
        _GAP.join(
            _padded(cell, width, right=name in _RIGHT) for cell, width, name in zip(row, widths, _HEAD, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [_cut(line, columns) for line in lines] if columns else lines


def _named(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
    """Lines of which the first one has the name."""
    return [("" if index else name, value) for index, value in enumerate(values)]


def _row(status: RunStatus) -> tuple[str, ...]:
    why = "" if status.state == "finished" else status.why
    reason = "; ".join(_one_line(text) for text in [why, *status.damage] if text)
    loss = f"{status.loss:.4f}" if status.loss is not None else ""
    steps = "" if status.state == "unreadable" else _steps(status)
    age = duration(status.age_s) if status.age_s is not None else ""
    return _printable(status.run_dir).replace("\n", "?"), status.state, steps, loss, age, reason


def _one_line(text: str) -> str:
    """The first line, without characters that move the cursor."""
    return _printable((text.splitlines() or [""])[0])


def _goodput_text(goodput: dict[str, float]) -> str:
    """The ratio, then what took at least a second. Of what took no time nothing is said."""
    parts = [f"{duration(goodput[name])} {words}" for name, words in TIMES.items() if goodput[name] >= 1.0]
    return ", ".join([f"{goodput['ratio']:.1%}", *parts])


def _copy_text(status: RunStatus) -> str:
    found = status.wandb or {}
    lacking, in_files = found["lacking_steps"], found["in_files_steps"]
    if found["mode"] == "offline" and lacking == in_files:
        return f"offline, files have all steps; phalanx wandb {status.run_dir} sends them"
    if not lacking:
        return "has all steps"
    files = f", {in_files} of them in offline files" if in_files else ""
    how = "its copy follows" if status.live else f"phalanx wandb {status.run_dir} sends them"
    return f"lacks {lacking} of {status.step} steps{files}; {how}"


def _printable(text: str) -> str:
    """Without characters that would change colours, the title or the cursor of a terminal. Lines stay lines."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def _steps(status: RunStatus) -> str:
    return f"{status.step}/{status.total_steps}" if status.total_steps is not None else str(status.step)


def _padded(cell: str, width: int, right: bool) -> str:
    blanks = " " * (width - cell_len(cell))
    return blanks + cell if right else cell + blanks


def _cut(line: str, columns: int) -> str:
    return line if cell_len(line) <= columns else set_cell_size(line, columns - 1) + "…"


def _job_text(job: dict[str, Any]) -> str:
    if "unknown" in job:
        return job["unknown"]
    words = [f"{job['number']} {job['state'].lower()}"]
    words += [f"on {job['nodes']}"] if job["nodes"] else []
    words += [f"without {', '.join(job['requeued_excluding'])}"] if job["requeued_excluding"] else []
    return ", ".join(words)
