"""A run's history from a long record: what is parsed, and that the steps are those of the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.load import load_config
from parallel.batch import global_batch_at
from pretrain.data import history
from pretrain.data.history import SKIPPED, TRAINED, RunHistory, Stretch
from pretrain.run import files
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.folder import RunFolder

STEPS, SKIPPED_STEP, SECOND_ATTEMPT = 12_000, 7_777, 3_000
RAMP = ("batch.ramp.start_seqs=8", "batch.ramp.increment_seqs=8", "batch.ramp.samples=40000")


def long_run(path: Path) -> tuple[RunFolder, list[Stretch]]:
    """A run whose record has 14 MB, and each of its steps."""
    folder = RunFolder(path)
    loaded = load_config("quickstart", [f"run.steps={STEPS}", "batch.global_batch_seqs=32", "model.vocab_size=512", *RAMP])
    folder.config.write_text(loaded.text)
    append_event(folder, 1, EventKind.TRAINING, 1.0, step=1)
    append_event(folder, 2, EventKind.TRAINING, 2.0, step=SECOND_ATTEMPT)
    steps, samples = [], 0
    with open(folder.metrics, "w") as file:
        for step in range(1, STEPS + 1):
            seqs, skipped = global_batch_at(loaded.config.batch, samples), step == SKIPPED_STEP
            steps.append(Stretch(step, 1, samples, seqs, 1 + (step >= SECOND_ATTEMPT), SKIPPED if skipped else TRAINED))
            samples += seqs
            row = {"step": step, "loss": 1.0, "samples": samples, "filler": "x" * 1100} | ({"skipped": True} if skipped else {})
            file.write(json.dumps(row) + "\n")
    return folder, steps


def test_a_long_record_is_not_parsed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, steps = long_run(tmp_path)
    parsed, parts = [], []
    parse, iterate = history.parse_line, history.iterate_parts
    for module in (history, files):
        monkeypatch.setattr(module, "parse_line", lambda line: parsed.append(len(line)) or parse(line))
    monkeypatch.setattr(history, "iterate_parts", lambda *args: (parts.append(len(part)) or part for part in iterate(*args)))
    read = RunHistory(folder)

    whole = list(read.stretches())
    assert [one.at(step) for one in whole for step in range(one.first_step, one.end_step)] == steps
    # Four sizes of batch, two attempts, and a skipped step in the midst of one.
    assert len(whole) == 4 + 1 + 2 and len(parsed) < STEPS / 20
    assert sum(parts) == folder.metrics.stat().st_size

    for first, last in ((1, 1), (SKIPPED_STEP - 1, SKIPPED_STEP + 1), (SECOND_ATTEMPT - 1, SECOND_ATTEMPT), (STEPS, STEPS + 5)):
        parsed.clear()
        parts.clear()
        found = [one.at(step) for one in read.stretches(first, last) for step in range(one.first_step, one.end_step)]
        assert [one for one in found if first <= one.first_step <= last] == steps[first - 1 : last]
        assert read.newest() == steps[-1]
        assert len(parsed) < STEPS / 20 and sum(parts) < 0.7 * folder.metrics.stat().st_size, (first, last)


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    folder, steps = long_run(tmp_path)
    lines, bad = folder.metrics.read_bytes().splitlines(keepends=True), 9_000
    line = lines[bad - 1]
    for damage, gone in ((b"", 1), (line[:40], 2), (b"\0" * len(line), 2), (b"[]\n", 1)):
        lines[bad - 1] = damage
        folder.metrics.write_bytes(b"".join(lines) + b'{"step": 12001, "sam')
        read = RunHistory(folder)
        found = [one.at(step) for one in read.stretches() for step in range(one.first_step, one.end_step)]
        assert found == steps[: bad - 1] + steps[bad - 1 + gone :], damage
        assert read.newest() == steps[-1]
