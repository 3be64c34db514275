"""An event of events.jsonl as a sentence for people. In: a row. Out: one line.

Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain.run.events import EventKind

_MOST_CHARS = 160
_MOST_NAMES = 4

Row = Mapping[str, Any]


def sentence(row: Row) -> str:
    """What happened, in one line. A kind that this version does not know is named."""
    words = _WORDS.get(row["kind"])
    text = words(row) if words else f"{row['kind']}, an event of another version of Phalanx"
    first = (text.splitlines() or [""])[0]
    return first if len(first) <= _MOST_CHARS else first[: _MOST_CHARS - 1] + "…"


def clock(time_s: float, now_s: float) -> str:
    """The time of day, with the date where it is not today's."""
    try:
        then, now = time.localtime(time_s), time.localtime(now_s)
    except (OverflowError, ValueError, OSError):
        return "?"
    today = (then.tm_year, then.tm_yday) == (now.tm_year, now.tm_yday)
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)


def _names(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(str, names[:_MOST_NAMES])) + more


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _attempt(row: Row) -> str:
    return f"attempt {row['attempt']} began" + (f" in job {row['slurm_job']}" if row["slurm_job"] else "")


def _ended(row: Row) -> str:
    node = f", on {row['node']}" if row["node"] else ""
    done = row["step_after"] - row["step_before"]
    kept = f"{_steps(done)} more are saved" if done > 0 else "no further step is saved"
    return f"the attempt ended, {row['cause'].replace('_', ' ')}{node}: {row['why']} ({kept})"


def _gap(row: Row) -> str:
    until = row.get("next_step", row.get("restored_step"))
    return f"the record lacks rows after step {row['after_step']}" + (f", up to step {until}" if until is not None else "")


def _submitted(row: Row) -> str:
    jobs = f"job {row['jobs'][0]}" if len(row["jobs"]) == 1 else f"jobs {_names(row['jobs']) or '(none)'}"
    return f"{jobs} submitted to Slurm" + (f": {row['why']}" if row.get("why") else "")


def _requeued(row: Row) -> str:
    without = f", without {_names(row['exclude'])}" if row["exclude"] else ""
    return f"back in the queue{without}: {row['why']}"


_WORDS: dict[str, Callable[[Row], str]] = {
    EventKind.ATTEMPT: _attempt,
    EventKind.EVENTS_MENDED: lambda row: f"the torn last line of events.jsonl was removed ({row['cut_bytes']} bytes)",
    EventKind.NO_OUTCOME: lambda row: f"attempt {row['of_attempt']} had ended without an outcome: it was killed",
    EventKind.RESUMED: lambda row: f"goes on from the checkpoint of step {row['step']}",
    EventKind.WARM_START: lambda row: f"begins with the weights of {row['folder']}",
    EventKind.TRAINING: lambda row: f"start-up is over, step {row['step']} begins",
    EventKind.OUTCOME: lambda row: f"{row['state']} at step {row['step']}: {row['why']}",
    EventKind.RECORD_MENDED: lambda row: f"the torn last line of metrics.jsonl was removed ({row['cut_bytes']} bytes)",
    EventKind.RECORD_GAP: _gap,
    EventKind.RECORD_CUT: lambda row: f"{_rows(row['rows'])} after step {row['restored_step']} removed: trained again",
    EventKind.RECORD_REFUSED: lambda row: f"the rows after step {row['after_step']} wait in memory: {row['why']}",
    EventKind.RECORD_ACCEPTED: lambda row: f"the rows that waited {row['seconds']:.0f} s are written, up to step {row['step']}",
    EventKind.SAVED: lambda row: f"checkpoint of step {row['step']} is complete, after {row['seconds']:.1f} s",
    EventKind.SAVE_FAILED: lambda row: f"saving {row['folder']} failed: {row['why']}",
    EventKind.PRUNED: lambda row: f"checkpoint {row['folder']} deleted, as checkpoint.keep demands",
    EventKind.PRUNE_FAILED: lambda row: f"an old checkpoint could not be deleted: {row['why']}",
    EventKind.CHECKPOINT_DAMAGED: lambda row: f"checkpoint {row['folder']} is damaged, kept as {row['kept_as']}: {row['why']}",
    EventKind.OPTIMIZER_RESET: lambda row: f"the optimizer starts afresh at checkpoint {row['folder']}: {row['why']}",
    EventKind.CHECKPOINT_ROLLED_BACK: lambda row: f"checkpoint {row['folder']} set aside as {row['kept_as']}",
    EventKind.SKIPPED_STEP: lambda row: f"step {row['step']} was not applied: {row['rule']}; the next batch follows",
    EventKind.ROLLED_BACK: lambda row: f"rolled back from step {row['from_step']} to step {row['to_step']}: {row['rule']}",
    EventKind.WENT_BACK: lambda row: f"went back from step {row['from_step']} to step {row['to_step']}",
    EventKind.DIVERGED: lambda row: f"diverged at step {row['step']}: {row['rule']}",
    EventKind.HUNG: lambda row: f"hung, and ended: {row['why']}",
    EventKind.STRAGGLER: lambda row: f"node {row['node']} is slow: {row['what']} takes {row['ratio']:.1f} times the median",
    EventKind.JOB_SUBMITTED: _submitted,
    EventKind.JOB_ATTEMPT: lambda row: f"attempt {row['attempt']} starts on {_names(row['nodes'])} in job {row['job']}",
    EventKind.JOB_SIGNAL: lambda row: f"{row['signal']} asks the ranks to save and end: {row['asked'].replace('_', ' ')}",
    EventKind.JOB_ENDED: _ended,
    EventKind.JOB_REQUEUED: _requeued,
    EventKind.JOB_RESTARTED: lambda row: f"starts again in place on {_names(row['nodes'])}: {row['why']}",
    EventKind.JOB_OVER: lambda row: f"the run is over, {row['state'].replace('_', ' ')}: {row['why']}",
}
