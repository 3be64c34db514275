"""`phalanx status` of a Slurm run whose batch step was killed before it recorded the end: the outcome of the ranks decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.status import read_status
from pretrain.run.files import write_json
from pretrain.run.folder import Outcome, RunFolder

SUBMITTED: dict[str, Any] = {"attempt": 0, "kind": "job_submitted", "jobs": [7]}
BEGUN = {"attempt": 1, "kind": "job_attempt", "nodes": ["n1"], "step_before": 0, "job": 7, "restarts": 0, "logs": ""}
ENDED = {"attempt": 1, "kind": "job_ended", "cause": "preempted", "why": "so", "node": "", "step_before": 0, "step_after": 5}
REQUEUED = {"attempt": 1, "kind": "job_requeued", "why": "preempted", "exclude": []}
OVER = {"attempt": 1, "kind": "job_over", "state": "preempted", "exit_code": 75, "why": "so"}
LOCAL = {"attempt": 1, "kind": "attempt", "wandb_id": "x", "logs": None, "slurm_job": None, "resume_step": None, "began": 1.0}
# What squeue answers instead of a state.
FORGOTTEN, AWAY = "slurm_load_jobs error: Invalid job id specified", "Unable to contact slurm controller"


def slurm_says(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """`answer`: the job's state, or an error."""
    is_state = answer.isupper()
    lines = [f"echo '7|{answer}|None|n1|N/A'"] if is_state else [f"echo '{answer}' >&2", "exit 1"]
    for name, text in (("squeue", lines), ("sacct", ["exit 1"])):
        (folder / name).write_text("\n".join(["#!/bin/sh", *text]) + "\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def make_run(path: Path, events: list[dict[str, Any]], outcome: Outcome | None) -> RunFolder:
    folder = RunFolder(path)
    folder.launch_dir(1).mkdir(parents=True)
    (folder.launch_dir(1) / "config.yaml").touch()
    folder.events.write_text("".join(json.dumps({"time": 1.0e9} | event) + "\n" for event in events))
    if outcome is not None:
        write_json(folder.outcome, outcome.as_dict())
    return folder


@pytest.mark.parametrize(
    ("job", "left", "events", "state"),
    [
        ("FAILED", "finished", [SUBMITTED, BEGUN], "finished"),
        (FORGOTTEN, "finished", [SUBMITTED, BEGUN], "finished"),
        (AWAY, "finished", [SUBMITTED, BEGUN], "finished"),
        ("RUNNING", "finished", [SUBMITTED, BEGUN], "finished"),
        ("CANCELLED", "diverged", [SUBMITTED, BEGUN], "diverged"),
        ("FAILED", "stopped", [SUBMITTED, BEGUN, ENDED | {"cause": "stopped"}], "stopped"),
        # A further attempt follows, unless the job is gone.
        ("FAILED", "preempted", [SUBMITTED, BEGUN, ENDED], "preempted"),
        ("TIMEOUT", "preempted", [SUBMITTED, BEGUN], "preempted"),
        (FORGOTTEN, "failed", [SUBMITTED, BEGUN], "failed"),
        ("CANCELLED", "preempted", [SUBMITTED, BEGUN], "stopped"),
        ("RUNNING", "failed", [SUBMITTED, BEGUN], "starting"),
        ("PENDING", "preempted", [SUBMITTED, BEGUN, ENDED, REQUEUED], "queued"),
        (AWAY, "preempted", [SUBMITTED, BEGUN], "running"),
        # The outcome is that of an attempt before.
        ("FAILED", "preempted", [SUBMITTED, BEGUN, ENDED, REQUEUED], "died"),
        ("FAILED", "finished", [SUBMITTED, BEGUN | {"attempt": 2}], "died"),
        ("RUNNING", "finished", [SUBMITTED, BEGUN, SUBMITTED | {"jobs": [8]}], "starting"),
        ("FAILED", "", [SUBMITTED, BEGUN], "died"),
        # Then the local launcher went on with it.
        ("FAILED", "finished", [SUBMITTED, BEGUN | {"attempt": 0}, OVER, LOCAL], "finished"),
        ("FAILED", "", [SUBMITTED, BEGUN | {"attempt": 0}, OVER, LOCAL], "died"),
        ("FAILED", "", [SUBMITTED, BEGUN | {"attempt": 0}, OVER, LOCAL | {"slurm_job": "7"}], "preempted"),
    ],
)
def test_the_outcome_decides_where_the_batch_step_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, left: str, events: list[dict[str, Any]], state: str
) -> None:
    slurm_says(tmp_path, monkeypatch, job)
    status = read_status(make_run(tmp_path / "run", events, Outcome(1, left, "step 9", 9, 9) if left else None))
    assert (status.state, status.live) == (state, state in ("running", "queued", "starting")), status.why
