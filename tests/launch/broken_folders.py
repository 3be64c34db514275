"""Run folders that crashes, other tools and other versions have spoilt: how each is made, and what its status says."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROW = {"step": 7, "loss": 2.5, "tokens": 4096, "tokens_per_s": 100.0, "step_time_s": 0.1}
ENDED: dict[str, Any] = {"time": 1.0e9, "attempt": 1, "kind": "job_ended", "cause": "crashed", "why": "rank 1", "node": "n1"}
ENDED |= {"step_before": 0, "step_after": 5}


def make_run(path: Path) -> Path:
    """A run that was killed at step 7."""
    (path / "launch" / "attempt_0001").mkdir(parents=True)
    for folder in (path, path / "launch" / "attempt_0001"):
        (folder / "config.yaml").write_text("run: {name: a, steps: 10}\n")
    (path / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    event = {"time": time.time(), "attempt": 1, "kind": "attempt", "wandb_id": "x", "logs": None, "slurm_job": None}
    (path / "events.jsonl").write_text(json.dumps(event) + "\n")
    return path


def _junk_events(run: Path) -> None:
    lines = [b"\xff\xfe\x00", b"[1, 2]", b'{"kind": "attempt"}', b'{"time": "x", "attempt": [], "kind": {}}', b"null"]
    lines += [
        json.dumps(ENDED | {"step_before": "many"}).encode(),
        b'{"time": 1, "attempt": 1, "kind": "job_submitted", "jobs": 5}',
    ]
    (run / "events.jsonl").write_bytes(b"\n".join(lines) + b'\n{"time": 1.0, "att')


def _rubbish(run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "outcome.json", "lock", "DONE"):
        (run / name).write_bytes(bytes(range(256)) * 40)


def _folders_for_files(run: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
        (run / name).mkdir()


def _odd_numbers(run: Path) -> None:
    rows = [ROW | {"loss": None}, ROW | {"loss": "high", "step_time_s": [1], "tokens": {}, "step": "8"}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"loss": NaN, "step": 1e400}\n')


def _odd_json(run: Path) -> None:
    (run / "outcome.json").write_text('{"attempt": [], "state": "asleep", "why": 3, "step": null, "consumed_samples": "x"}')
    (run / "lock").write_text('{"host": 3, "pid": "x", "attempt": null, "start_ticks": [], "released": "no"}')
    (run / "DONE").write_text('{"step": "all"}')


def _files_for_folders(run: Path) -> None:
    (run / "launch" / "attempt_0001" / "config.yaml").unlink()
    (run / "launch" / "attempt_0001").rmdir()
    (run / "launch").rmdir()
    for name in ("launch", "logs", "checkpoints"):
        (run / name).write_text("a file\n")


def _dangling_links(run: Path) -> None:
    for name in ("metrics.jsonl", "config.yaml", "outcome.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(run / "nowhere")


def _loop(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(run / "metrics.jsonl")


def _pipe(name: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return spoil


def _record(*lines: bytes) -> Callable[[Path], object]:
    """Each of these between the rows 6, 7 and 8."""
    rows = [json.dumps(ROW | {"step": step, "samples": 8 * step}).encode() + b"\n" for step in (6, 7, 8)]
    return lambda run: (run / "metrics.jsonl").write_bytes(b"".join(row + line for line in lines for row in rows))


def _utf16(run: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml"):
        (run / name).write_bytes((run / name).read_text().encode("utf-16"))


def _config_folder(run: Path) -> None:
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()


def _huge(run: Path) -> None:
    """Files with holes: they take no room on the disk."""
    for name in ("metrics.jsonl", "outcome.json"):
        with (run / name).open("ab") as file:
            file.truncate(3 << 30)


def _numbers_beyond_any(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1%s, "loss": -1e308, "tokens": 1e308, "tokens_per_s": 1e400}\n' % ("0" * 400))
    row = {"time": time.time(), "attempt": 1, "kind": "of another version", "ratio": 0}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(row | {"a": math.inf, "b": math.nan}) + "\n")
        file.write('{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}\n")


def _zero_tokens(run: Path) -> None:
    (run / "config.yaml").write_text("run: {tokens: 10}\nbatch: {seq_length_tokens: 0}\n")


def _never_began(run: Path) -> None:
    """The ranks refused their input: no attempt was opened, and the launcher is gone."""
    (run / "launch" / "attempt_0001" / "config.yaml").unlink()
    launcher = {"host": socket.gethostname(), "pid": 2**22 + 1, "start_ticks": 5}
    (run / "launch" / "attempt_0001" / "launcher.json").write_text(json.dumps(launcher))


def _newer_version(run: Path) -> None:
    rows = [{"time": 4e18, "attempt": 1, "kind": "dreamt", "of": "sheep"}, ENDED | {"cause": "bored"}]
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (run / "config.yaml").write_text("run: {name: a, moons: 3}\nzodiac: {}\n")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "whole": (lambda run: None, "died"),
    "empty files": (lambda run: [path.write_text("") for path in run.glob("*.jsonl")], "died"),
    "half a record": (lambda run: (run / "metrics.jsonl").write_text('{"step": 7, "lo'), "died"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "died"),
    "no events": (lambda run: (run / "events.jsonl").unlink(), "died"),
    "only a config": (lambda run: [(run / name).unlink() for name in ("events.jsonl", "metrics.jsonl")], "died"),
    "junk events": (_junk_events, "7 lines are no events"),
    "binary rubbish": (_rubbish, "config.yaml: is no text"),
    "folders for files": (_folders_for_files, "unreadable"),
    "odd numbers": (_odd_numbers, "died"),
    "odd json": (_odd_json, "died"),
    "files for folders": (_files_for_folders, "starting"),
    "dangling links": (_dangling_links, "died"),
    "a link to itself": (_loop, "died"),
    "a named pipe": (_pipe("events.jsonl"), "events.jsonl must be a file, it is a named pipe"),
    "a pipe for a record": (_pipe("metrics.jsonl"), "metrics.jsonl must be a file, it is a named pipe"),
    "a pipe for counts": (_pipe("experts.jsonl"), "experts.jsonl must be a file, it is a named pipe"),
    "a folder for a config": (_config_folder, "config.yaml must be a file, it is a folder"),
    "a torn row inside": (_record(b'{"step": 7, "lo'), "died"),
    "zeros inside": (_record(b"\0" * 100_000), "died"),
    "zeros at the end": (lambda run: (run / "metrics.jsonl").write_bytes(b"\0" * 600_000), "metrics.jsonl: no rows at its end"),
    "rows again": (_record(b"", b""), "died"),
    "NaN and infinity": (_record(b'{"step": 7, "samples": NaN, "loss": -Infinity, "steps_s": Infinity}\n'), "died"),
    "junk inside": (_record(bytes(range(256)) + b"\n"), "died"),
    "another encoding": (_utf16, "config.yaml: is no text"),
    "no attempts": (lambda run: shutil.rmtree(run / "launch"), "starting"),
    "half a config": (lambda run: (run / "config.yaml").write_text("run: {name: a, st"), "config.yaml: "),
    "huge files": (_huge, "outcome.json must have at most 16 MiB, it has 3072 MiB"),
    "numbers beyond any": (_numbers_beyond_any, "events.jsonl: 1 line is no event"),
    "zero tokens": (_zero_tokens, "batch.seq_length_tokens: must be"),
    "never began": (_never_began, "attempt 1 ended before it began to train"),
    "a newer version": (_newer_version, "config.yaml: "),
}
