"""Where the time of a run went. In: events.jsonl and the step times of metrics.jsonl. Out: `Goodput`.

The time of a run is that of its attempts and of its waits in Slurm's queue. The time in which nobody had started the run is not
counted. The goodput is the share of the steps that count: those that stand in the record.

    queue      job submitted or requeued → attempt begins
    start-up   attempt begins → its first step begins
    again      steps whose rows were removed from the record: a restart or a rollback repeats them
    saves      the training loop waits for a save
    detection  last progress of the ranks → the watchdog's verdict that they hang
    other      the rest of the attempts: validation, agreement of the ranks, unfinished steps, the end of the processes

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.folder import RunFolder
from pretrain.run.record_rows import steps_seconds, sum_step_times

# Events that another process writes after the attempt that they name has ended.
AFTERWARDS = frozenset({EventKind.JOB_SUBMITTED, EventKind.JOB_REQUEUED, EventKind.JOB_OVER})


@dataclass(frozen=True)
class Goodput:
    """The seconds of a run by what they were spent on. The module's docstring says what each name covers."""

    steps_s: float
    again_s: float
    startup_s: float
    saves_s: float
    queue_s: float
    detection_s: float
    other_s: float

    @property
    def total_s(self) -> float:
        return sum(asdict(self).values())

    @property
    def ratio(self) -> float:
        """`steps_s` as a share of the sum, from 0 to 1."""
        return self.steps_s / self.total_s if self.total_s else 0.0

    def as_dict(self) -> dict[str, float]:
        """The ratio and the seconds, as `phalanx status --json`, the `outcome` event and W&B's summary have them."""
        return {"ratio": round(self.ratio, 4), **{name: round(value, 3) for name, value in asdict(self).items()}}


@dataclass
class _Attempt:
    """Moments of an attempt in seconds since the epoch, and seconds inside of it. None: it is not recorded."""

    start_s: float | None = None
    training_s: float | None = None
    end_s: float | None = None
    # The newest sign of the attempt, for an attempt whose end nobody recorded.
    last_s: float = 0.0
    saves_s: float = 0.0
    detection_s: float = 0.0


@dataclass
class _Wait:
    """A wait in the queue. It began at the end of `after`, or at `since_s` where no attempt came before it."""

    since_s: float
    after: _Attempt | None = None
    until_s: float | None = None


def attempt_seconds(goodput: Mapping[str, float]) -> float:
    """The time of the attempts, without the queue's. `goodput`: as `Goodput.as_dict` gives it."""
    return sum(value for name, value in goodput.items() if name.endswith("_s") and name != "queue_s")


class TimeLedger:
    """Adds up a run's time from its events, given oldest first. Cheap: it keeps a few numbers of each attempt."""

    def __init__(self) -> None:
        self._attempts: dict[int, _Attempt] = {}
        self._waits: list[_Wait] = []
        # The end of the newest attempt is recorded, and no decision has followed it yet.
        self._ended: _Attempt | None = None
        # The job of the newest attempt; None: the run is over.
        self._job: int | None = None
        self._is_known = True

    def add(self, event: Mapping[str, Any]) -> None:
        kind, number, time_s = event["kind"], event["attempt"], event["time"]
        attempt = self._attempts.setdefault(number, _Attempt()) if number else None
        if attempt is not None and kind not in AFTERWARDS and not event.get("post_mortem"):
            attempt.last_s = max(attempt.last_s, time_s)
        if kind in (EventKind.JOB_SUBMITTED, EventKind.JOB_REQUEUED):
            self._begin_wait(event, attempt)
        elif kind == EventKind.JOB_OVER:
            self._end_wait(time_s)
            self._ended = self._job = None
        elif attempt is not None:
            self._add_to(attempt, event)

    def _add_to(self, attempt: _Attempt, event: Mapping[str, Any]) -> None:
        time_s = event["time"]
        match event["kind"]:
            case EventKind.JOB_ATTEMPT:
                self._begin_attempt(event, attempt)
            case EventKind.ATTEMPT:
                self._is_known = self._is_known and "began" in event
                attempt.start_s = event.get("began") if attempt.start_s is None else attempt.start_s
            case EventKind.TRAINING:
                attempt.training_s = time_s
            case EventKind.SAVED | EventKind.SAVE_FAILED:
                attempt.saves_s += event.get("blocked_s", 0.0)
            case EventKind.HUNG:
                attempt.detection_s += event.get("seconds", 0.0)
            case EventKind.OUTCOME:
                attempt.end_s = time_s
            case EventKind.JOB_ENDED:
                attempt.end_s = attempt.end_s if event.get("post_mortem") else time_s
                self._ended = attempt
            case EventKind.NO_OUTCOME:
                before = self._attempts.setdefault(event["of_attempt"], _Attempt())
                before.last_s = max(before.last_s, event.get("last_sign", 0.0))
            case _:
                pass

    def goodput(self, steps_s: float, again_s: float, until_s: float) -> Goodput | None:
        """The time up to `until_s`, in seconds since the epoch. None: the events don't tell it, or no time has passed.

        `steps_s` and `again_s`: the sums of the step times in the record, and of those that were removed from it.
        """
        if not self._is_known or not (self._attempts or self._waits):
            return None
        newest = self._attempts[max(self._attempts)] if self._attempts else None
        trained_s = startup_s = 0.0
        for attempt in self._attempts.values():
            if attempt.start_s is None:
                continue
            end_s = _end_s(attempt, until_s if attempt is newest else None)
            begun_s = min(end_s, attempt.training_s) if attempt.training_s is not None else end_s
            startup_s += max(0.0, begun_s - attempt.start_s)
            trained_s += max(0.0, end_s - max(begun_s, attempt.start_s))
        queue_s = 0.0
        for wait in self._waits:
            since_s = wait.since_s if wait.after is None else _end_s(wait.after, None)
            queue_s += max(0.0, (until_s if wait.until_s is None else wait.until_s) - since_s)
        saves_s = sum(attempt.saves_s for attempt in self._attempts.values())
        detection_s = sum(attempt.detection_s for attempt in self._attempts.values())
        other_s = max(0.0, trained_s - steps_s - again_s - saves_s - detection_s)
        found = Goodput(steps_s, again_s, startup_s, saves_s, queue_s, detection_s, other_s)
        return found if found.total_s else None

    def _begin_wait(self, event: Mapping[str, Any], attempt: _Attempt | None) -> None:
        if self._waits and self._waits[-1].until_s is None:
            return
        if event["kind"] == EventKind.JOB_REQUEUED:
            self._waits.append(_Wait(event["time"], after=attempt))
        elif self._job not in event["jobs"]:
            # Otherwise the job began before its submitter had written this row, or a job was added behind it.
            self._waits.append(_Wait(event["time"]))

    def _end_wait(self, time_s: float) -> bool:
        """Whether a wait was open."""
        is_open = bool(self._waits) and self._waits[-1].until_s is None
        if is_open:
            self._waits[-1].until_s = time_s
        return is_open

    def _begin_attempt(self, event: Mapping[str, Any], attempt: _Attempt) -> None:
        was_waiting, ended, self._ended = self._end_wait(event["time"]), self._ended, None
        # A restart inside the allocation begins where the attempt before it ended.
        attempt.start_s = event["time"] if was_waiting or ended is None else _end_s(ended, None)
        self._job = event["job"]


def _end_s(attempt: _Attempt, until_s: float | None) -> float:
    """The recorded end, else `until_s`, else the newest sign of the attempt."""
    if attempt.end_s is not None:
        return attempt.end_s
    return attempt.last_s if until_s is None else max(until_s, attempt.last_s)


def record_seconds(folder: RunFolder) -> tuple[float, float]:
    """(step times of the record, step times of the rows that were removed from it), each summed in seconds. Raises OSError."""
    removed = (folder.path / "launch").glob("attempt_*/metrics_cut.jsonl")
    return steps_seconds(folder.metrics), sum(map(sum_step_times, removed))


def read_goodput(folder: RunFolder, until_s: float) -> Goodput | None:
    """The run's time up to `until_s`, in seconds since the epoch. None: the events don't tell it, or the disk fails to."""
    ledger = TimeLedger()
    try:
        for event in read_events(folder):
            ledger.add(event)
        return ledger.goodput(*record_seconds(folder), until_s)
    except OSError:
        # The end of a run has more to tell than this.
        return None
