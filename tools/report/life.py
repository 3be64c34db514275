"""The life of a run for the page: attempts as a timeline, marks, events in words. In: events.jsonl. Out: a document.

One pass over the events, which keeps a bounded number of each.

Torch-free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from launch.event_words import sentence
from launch.status import QUIET
from pretrain.metrics.goodput import AFTERWARDS
from pretrain.run.events import EventKind

_MOST_ATTEMPTS, _MOST_EVENTS, _MOST_MARKS, _MOST_SAVES = 300, 300, 500, 300
_MARKED = {
    EventKind.SKIPPED_STEP: ("skip", "step"),
    EventKind.ROLLED_BACK: ("rollback", "to_step"),
    EventKind.WENT_BACK: ("rollback", "to_step"),
    EventKind.DIVERGED: ("skip", "step"),
}


def _new_attempt(number: int) -> dict[str, Any]:
    keys = ("queued_s", "start_s", "training_s", "end_s", "hung_s", "first_step", "job")
    empty: dict[str, Any] = dict.fromkeys(keys)
    return {"attempt": number, **empty, "last_s": 0.0, "nodes": [], "state": "", "why": "", "again_steps": 0, "saves": 0,
            "blocked_s": 0.0, "notes": []}  # fmt: skip


class Life:
    """Takes events, oldest first, and gives the document of the timeline. `damaged`: lines that are no events."""

    def __init__(self) -> None:
        self.damaged = 0
        self.marks: list[dict[str, Any]] = []
        self._saves: list[dict[str, Any]] = []
        # Every so many saves are kept; doubled where there are too many.
        self._save_stride = 1
        self._seen_saves = 0
        self._attempts: dict[int, dict[str, Any]] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)
        self._waiting_s: float | None = None

    def add_all(self, events: Iterable[Mapping[str, Any] | None]) -> Life:
        for event in events:
            if event is None:
                self.damaged += 1
            else:
                self._add(event)
        return self

    def as_dict(self, now_s: float | None) -> dict[str, Any]:
        """`now_s`: the time now, where the newest attempt may be alive."""
        newest = max(self._attempts, default=0)
        attempts = [
            attempt | {"end_s": attempt["end_s"] or (now_s if number == newest and now_s else attempt["last_s"])}
            for number, attempt in self._attempts.items()
        ]
        return {"attempts": attempts, "saves": self._saves, "events": list(self._events), "waiting_s": self._waiting_s}

    def _add(self, event: Mapping[str, Any]) -> None:
        kind, number, time_s = event["kind"], event["attempt"], event["time"]
        if kind not in QUIET:
            self._events.append({"time": time_s, "attempt": number, "kind": str(kind), "text": sentence(event)})
        if kind in (EventKind.JOB_SUBMITTED, EventKind.JOB_REQUEUED):
            self._waiting_s = time_s if self._waiting_s is None else self._waiting_s
            return
        if number < 1:
            return
        attempt = self._attempts.setdefault(number, _new_attempt(number))
        if len(self._attempts) > _MOST_ATTEMPTS:
            del self._attempts[min(self._attempts)]
        if kind not in AFTERWARDS and not event.get("post_mortem"):
            attempt["last_s"] = max(attempt["last_s"], time_s)
        self._add_to(attempt, event)

    def _add_to(self, attempt: dict[str, Any], event: Mapping[str, Any]) -> None:
        time_s = event["time"]
        match event["kind"]:
            case EventKind.JOB_ATTEMPT | EventKind.ATTEMPT:
                if attempt["start_s"] is None:
                    start_s = event.get("began", time_s)
                    attempt["start_s"], attempt["queued_s"], self._waiting_s = start_s, self._waiting_s, None
                attempt["nodes"] = event.get("nodes", attempt["nodes"])[:64]
                attempt["job"] = event.get("job", event.get("slurm_job")) or attempt["job"]
            case EventKind.TRAINING:
                attempt["training_s"], attempt["first_step"] = time_s, event["step"]
                text = f"attempt {attempt['attempt']} begins with step {event['step']}"
                self._mark({"step": event["step"], "kind": "attempt", "text": text, "attempt": attempt["attempt"]})
            case EventKind.RECORD_CUT:
                attempt["again_steps"] += event["rows"]
            case EventKind.SAVED:
                attempt["saves"] += 1
                attempt["blocked_s"] += event.get("blocked_s", 0.0)
                self._save(event)
            case EventKind.HUNG:
                attempt["hung_s"] = event.get("seconds")
                attempt["notes"] = [*attempt["notes"], sentence(event)][-5:]
            case EventKind.STRAGGLER:
                attempt["notes"] = [*attempt["notes"], sentence(event)][-5:]
            case EventKind.OUTCOME:
                attempt.update(end_s=time_s, state=event["state"], why=event["why"][:500])
            case EventKind.JOB_ENDED:
                cause = event["cause"].replace("_", " ")
                attempt.update(end_s=attempt["end_s"] or time_s, state=attempt["state"] or cause, why=event["why"][:500])
            case EventKind.NO_OUTCOME:
                before = self._attempts.get(event["of_attempt"])
                if before is not None and not before["state"]:
                    before.update(state="killed", why="it ended without an outcome")
                    before["last_s"] = max(before["last_s"], event.get("last_sign", 0.0))
            case kind if kind in _MARKED:
                name, field = _MARKED[EventKind(kind)]
                self._mark({"step": event[field], "kind": name, "text": sentence(event)})
            case _:
                pass

    def _mark(self, mark: dict[str, Any]) -> None:
        self.marks.append(mark)
        if len(self.marks) > _MOST_MARKS:
            del self.marks[0]

    def _save(self, event: Mapping[str, Any]) -> None:
        if self._seen_saves % self._save_stride == 0:
            self._saves.append({"step": event["step"], "time": event["time"], "text": sentence(event)})
        self._seen_saves += 1
        if len(self._saves) > _MOST_SAVES:
            del self._saves[1::2]
            self._save_stride *= 2
