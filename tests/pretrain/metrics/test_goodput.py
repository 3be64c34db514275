"""Where a run's time went: every second once, over kills, requeues, restarts in place, hangs and nights between attempts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launch.status import read_status
from launch.status_text import describe
from pretrain.metrics.goodput import Goodput, TimeLedger, read_goodput
from pretrain.run.event_rows import is_event
from pretrain.run.events import EventKind
from pretrain.run.folder import RunFolder
from pretrain.run.record_rows import sum_step_times

ZERO = dict.fromkeys(("steps_s", "again_s", "startup_s", "saves_s", "queue_s", "detection_s", "other_s"), 0.0)


def row(time_s: float, attempt: int, kind: EventKind, **fields: Any) -> dict[str, Any]:
    needed: dict[EventKind, dict[str, Any]] = {
        EventKind.ATTEMPT: {"wandb_id": "w", "logs": None, "slurm_job": None},
        EventKind.TRAINING: {"step": 1},
        EventKind.OUTCOME: {"state": "finished", "why": "", "step": 1},
        EventKind.SAVED: {"step": 1, "folder": "step_0000001", "seconds": 9.0},
        EventKind.HUNG: {"why": "", "late": [], "nodes": []},
        EventKind.JOB_ATTEMPT: {"nodes": ["n1"], "logs": "", "job": 7, "restarts": 0, "step_before": 0},
        EventKind.JOB_ENDED: {"cause": "hung", "why": "", "node": "", "step_before": 0, "step_after": 0, "last_step": 0},
        EventKind.JOB_REQUEUED: {"why": "", "exclude": []},
        EventKind.JOB_OVER: {"state": "finished", "exit_code": 0, "why": ""},
    }
    made = {"time": time_s, "attempt": attempt, "kind": kind, **needed.get(kind, {}), **fields}
    assert is_event(made)
    return made


def add_up(events: list[dict[str, Any]], steps_s: float, again_s: float, until_s: float) -> Goodput:
    ledger = TimeLedger()
    for event in events:
        ledger.add(event)
    found = ledger.goodput(steps_s, again_s, until_s)
    assert found is not None
    return found


KILLED_AND_RESUMED = [
    row(14.0, 1, EventKind.ATTEMPT, began=10.0),
    row(20.0, 1, EventKind.TRAINING),
    row(50.0, 1, EventKind.SAVED, blocked_s=2.0),
    # Killed at 70; the heartbeat was last seen then. Started again after a night.
    row(9008.0, 2, EventKind.ATTEMPT, began=9000.0),
    row(9008.5, 2, EventKind.NO_OUTCOME, of_attempt=1, last_sign=70.0),
    row(9010.0, 2, EventKind.TRAINING),
    row(9110.0, 2, EventKind.OUTCOME),
]


def test_a_night_between_two_local_attempts_is_not_counted() -> None:
    found = add_up(KILLED_AND_RESUMED, steps_s=120.0, again_s=12.0, until_s=1e6)
    assert found == Goodput(steps_s=120.0, again_s=12.0, startup_s=20.0, saves_s=2.0, queue_s=0.0, detection_s=0.0, other_s=16.0)
    assert found.total_s == (70 - 10) + (9110 - 9000) and found.ratio == pytest.approx(120 / 170)


def test_slurm_attempts_queue_hang_and_restart_in_place() -> None:
    events = [
        row(0.0, 0, EventKind.JOB_SUBMITTED, jobs=[7]),
        row(100.0, 1, EventKind.JOB_ATTEMPT),
        # The submitter wrote its row late: the job runs already.
        row(101.0, 0, EventKind.JOB_SUBMITTED, jobs=[7]),
        row(108.0, 1, EventKind.ATTEMPT, began=103.0),
        row(110.0, 1, EventKind.TRAINING),
        row(200.0, 1, EventKind.HUNG, seconds=30.0),
        row(200.0, 1, EventKind.OUTCOME, state="failed"),
        row(205.0, 1, EventKind.JOB_ENDED),
        # In place: no queue between the two.
        row(206.0, 2, EventKind.JOB_ATTEMPT),
        row(207.0, 2, EventKind.ATTEMPT, began=206.5),
        row(208.0, 2, EventKind.TRAINING),
        # The node went away at 300, with the batch step. Slurm started the job on another one at 400.
        row(300.0, 2, EventKind.SAVED, blocked_s=1.0),
        row(400.0, 2, EventKind.JOB_ENDED, cause="bad_node", post_mortem=True),
        row(400.0, 2, EventKind.JOB_REQUEUED),
        row(401.0, 3, EventKind.JOB_ATTEMPT),
        row(405.0, 3, EventKind.ATTEMPT, began=402.0),
        row(405.0, 3, EventKind.NO_OUTCOME, of_attempt=2, last_sign=304.0),
        row(406.0, 3, EventKind.TRAINING),
        row(500.0, 3, EventKind.OUTCOME),
        row(502.0, 3, EventKind.JOB_ENDED, cause="finished"),
        row(502.0, 3, EventKind.JOB_OVER),
        # Trained on after a week.
        row(7e5, 3, EventKind.JOB_SUBMITTED, jobs=[8]),
    ]
    found = add_up(events, steps_s=200.0, again_s=5.0, until_s=7e5 + 50)
    assert found.queue_s == 100 + (401 - 304) + 50
    assert found.startup_s == 10 + (208 - 205) + 5
    assert (found.saves_s, found.detection_s) == (1.0, 30.0)
    assert found.total_s == pytest.approx(502 + 50), "every second of the run once"
    over = [*events, row(7e5 + 60, 3, EventKind.JOB_OVER)]
    assert add_up(over, 200.0, 5.0, 1e9).queue_s == found.queue_s + 10, "cancelled while it waited"


def test_an_attempt_that_lives_counts_up_to_now() -> None:
    starting = [row(14.0, 1, EventKind.ATTEMPT, began=10.0)]
    assert add_up(starting, 0.0, 0.0, 40.0) == Goodput(**{**ZERO, "startup_s": 30.0})
    training = [*starting, row(20.0, 1, EventKind.TRAINING)]
    assert add_up(training, 15.0, 0.0, 40.0) == Goodput(**{**ZERO, "startup_s": 10.0, "steps_s": 15.0, "other_s": 5.0})


def test_events_that_do_not_tell_give_no_numbers() -> None:
    assert TimeLedger().goodput(0.0, 0.0, 1.0) is None
    older = TimeLedger()
    older.add(row(14.0, 1, EventKind.ATTEMPT))
    assert older.goodput(1.0, 0.0, 40.0) is None


def test_step_times_are_found_without_parsing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert sum_step_times(path) == 0.0
    path.write_bytes(b"")
    assert sum_step_times(path) == 0.0
    times = [0.25, 12.5, 1e-05, 3]
    rows = [json.dumps({"step": n, "step_time_s": value, "text": "x" * 3_000_000}) for n, value in enumerate(times)]
    junk = ['{"step_time_s": null}', '{"step_time_s": "9"}', '{"step_time_s": -5}']
    path.write_text("\n".join([*rows, *junk]) + "\n" + rows[0][:40])
    assert sum_step_times(path) == pytest.approx(sum(times))


def test_status_reports_goodput_and_stays_fast(tmp_path: Path) -> None:
    """100,000 steps of rows as a run writes them: 85 MB."""
    folder = RunFolder(tmp_path)
    for number in (1, 2):
        folder.launch_dir(number).mkdir(parents=True)
    folder.config.write_text("run: {name: a, steps: 100000}\n")
    (folder.launch_dir(2) / "config.yaml").write_text("run: {name: a, steps: 100000}\n")
    (folder.launch_dir(2) / "metrics_cut.jsonl").write_text('{"step": 9, "step_time_s": 12.0}\n')
    line = json.dumps(
        {"step": 1, "loss": 2.5, "step_time_s": 0.0012, **{f"expert_load/layer_{n}": 1.0123456789 for n in range(20)}}
    )
    folder.metrics.write_text((line + "\n") * 100_000)
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in KILLED_AND_RESUMED))
    began_s = time.perf_counter()
    status = read_status(folder, is_whole=True)
    assert time.perf_counter() - began_s < 3.0, "parsing the rows takes longer"
    found = read_goodput(folder, 0.0)
    assert found is not None and status.goodput is not None and status.goodput == found.as_dict()
    assert status.goodput["steps_s"] == pytest.approx(120.0) and status.goodput["again_s"] == 12.0
    assert "70.6%, 2:00 in steps, 0:12 in steps done again, 0:20 start-up, 0:02 saves, 0:16 other" in describe(status)
    assert read_status(folder).goodput is None, "a list of runs reads no record"
