"""The cost of each interruption of a run. In: the run's events. Out: one `Interruption` for each gap between attempts.

The time that Slurm takes is reported apart from the time that saving and restoring take.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.run.events import EventKind


@dataclass(frozen=True)
class Interruption:
    """The gap between the attempts `before` and `after`. Times are in seconds. A value that was not recorded is None.

    `save_s` is the time from the signal to the end of the ranks. `slurm_s` is the time from the end of the ranks to the
    start of the next attempt, which covers requeue, queue and start. `restore_s` is the time from that start to the
    restored state, with imports and data. `lost_steps` counts the steps that must be trained again.
    """

    before: int
    after: int
    cause: str
    save_s: float | None
    slurm_s: float
    restore_s: float | None
    lost_steps: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        save = f"{self.save_s:.1f} s to save and end, " if self.save_s is not None else ""
        restore = f"{self.restore_s:.1f} s until restored" if self.restore_s is not None else "not restored yet"
        return f"attempt {self.before} → {self.after}, {self.cause}: {save}{self.slurm_s:.1f} s in Slurm's hands, {restore}"


def interruptions(rows: Iterable[Mapping[str, Any]]) -> list[Interruption]:
    """The interruptions, oldest first. `rows` are rows of events.jsonl; job_signal, job_ended, job_attempt and resumed count."""
    rows = list(rows)
    found = []
    for ended in (row for row in rows if row.get("kind") == EventKind.JOB_ENDED):
        number, end_s = ended["attempt"], ended["time"]
        started = next((row for row in rows if row.get("kind") == EventKind.JOB_ATTEMPT and row["attempt"] > number), None)
        if started is None:
            continue
        signal = _first(rows, EventKind.JOB_SIGNAL, number)
        resumed = _first(rows, EventKind.RESUMED, started["attempt"])
        found.append(
            Interruption(
                number,
                started["attempt"],
                ended["cause"],
                round(end_s - signal["time"], 3) if signal else None,
                round(started["time"] - end_s, 3),
                round(resumed["time"] - started["time"], 3) if resumed else None,
                max(0, ended["last_step"] - ended["step_after"]) if "last_step" in ended else None,
            )
        )
    return found


def _first(rows: Iterable[Mapping[str, Any]], kind: EventKind, attempt: int) -> Mapping[str, Any] | None:
    return next((row for row in rows if row.get("kind") == kind and row.get("attempt") == attempt), None)
