"""W&B is a copy of the record: each step once, whatever dies; and it never holds training up."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.schema import Config
from pretrain.metrics.sinks import NullSink
from pretrain.metrics.wandb_sink import CopySink, choose_mode, make_wandb_sink
from pretrain.metrics.wandb_steps import Cursor, from_spans, to_spans
from pretrain.run.folder import Outcome, RunFolder
from pretrain.run.record import Record
from pretrain.run.record_rows import read_rows
from tests.wandb_read import offline_rows, offline_steps
from tests.wandb_stub import KEY, WandbStub

ID = "run0id"

# An attempt as rank 0 makes it: the record cut back, then a row a step. Prints each step, so that a test can kill it.
WRITER = """
import os, sys, time
from pathlib import Path
from pretrain.run.folder import Outcome, RunFolder
from configs.schema import Config
from pretrain.run.record import Record
from pretrain.metrics.wandb_sink import make_wandb_sink

folder, restored, last, pause_s = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
config = Config()
config.metrics.wandb.finish_timeout_s = 20.0
record = Record.open(folder.metrics, restored, lambda kind, **fields: None)
sink = make_wandb_sink(config, folder, "run0id", os.environ)
for step in range(restored + 1, last + 1):
    row = {"step": step, "loss": 1.0 / step, "grad_norm": 1.0, "tokens": step}
    record.append(row)
    sink.write(row)
    print(step, flush=True)
    time.sleep(pause_s)
sink.close(Outcome(1, "finished", "", last, last))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """Without anything of this machine's W&B; nothing that waits long."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    return {**kept, "HOME": str(home), "WANDB_ERROR_REPORTING": "false", **more}


def writer(folder: Path, restored: int, last: int, pause_s: float, environ: dict[str, str]) -> subprocess.Popen[str]:
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", WRITER, str(folder), str(restored), str(last), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def kill_after_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    while int(process.stdout.readline()) < step:
        pass
    process.kill()
    process.communicate()


@pytest.fixture
def config() -> Config:
    config = Config()
    config.metrics.wandb.finish_timeout_s = 15.0
    return config


def write_rows(folder: RunFolder, sink: object, first: int, last: int) -> None:
    record = Record.open(folder.metrics, first - 1, lambda kind, **fields: None)
    for step in range(first, last + 1):
        row = {"step": step, "loss": float("nan") if step == 2 else 1.0, "grad_norm": 1.0, "tokens": step}
        record.append(row)
        sink.write(row)  # type: ignore[attr-defined]
    record.close()


def open_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.wandb.mkdir(parents=True)
    return folder


def test_offline_kills_and_replays_give_each_step_once(tmp_path: Path) -> None:
    """kill -9 of rank 0 at random rows, resume from an earlier step, replay: each step once in W&B, after `wandb sync` too."""
    rng = random.Random(7)
    environ = environment(tmp_path)
    folder = tmp_path / "run"
    restored = 0
    for last in (60, 120):
        process = writer(folder, restored, last, 0.05, environ)
        kill_after_step(process, rng.randint(restored + 15, last - 5))
        done = list(read_rows(folder / "metrics.jsonl"))[-1]["step"]
        restored = max(0, done - rng.randint(3, 12))
    # As of a copy that was killed at once: the header alone.
    empty = folder / "wandb" / f"offline-run-20200101_000000-{ID}" / f"run-{ID}.wandb"
    empty.parent.mkdir()
    empty.write_bytes(b":W&B\xe1\xbe\x00")
    process = writer(folder, restored, 130, 0.0, environ)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == list(range(1, 131))
    assert sorted(offline_steps(folder, ID)) == list(range(1, 131))
    with WandbStub() as stub:
        online = environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
        segments = sorted(map(str, (folder / "wandb").glob("offline-run-*")))
        assert len(segments) == 4
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *segments], env=online, check=True, capture_output=True, timeout=120
        )
        assert list(stub.runs) == [ID] and sorted(stub.runs[ID].steps()) == list(range(1, 131))


def test_a_cleaned_away_segment_is_not_sent_again(tmp_path: Path, config: Config) -> None:
    folder = open_folder(tmp_path / "run")
    environ = environment(tmp_path)
    for first, last in ((1, 5), (6, 9)):
        sink = make_wandb_sink(config, folder, ID, environ)
        write_rows(folder, sink, first, last)
        sink.close(Outcome(1, "stopped", "", last, last))
        if first == 1:
            for path in folder.wandb.glob("offline-run-*"):
                path.rename(tmp_path / "cleaned")
    assert offline_steps(folder.path, ID) == [6, 7, 8, 9]
    assert {step for spans in Cursor(folder).segments.values() for step in from_spans(spans)} == set(range(1, 10))


def test_a_killed_copy_is_started_again(tmp_path: Path, config: Config) -> None:
    """Killed in the last attempt, in the middle and at the end: W&B lacks nothing."""
    folder = open_folder(tmp_path / "run")
    sink = make_wandb_sink(config, folder, ID, environment(tmp_path))
    assert isinstance(sink, CopySink)
    write_rows(folder, sink, 1, 20)
    for first in (21, 41):
        sink._process.kill()
        sink._process.wait()
        write_rows(folder, sink, first, first + 19)
    sink._process.kill()
    sink._process.wait()
    sink.close(Outcome(1, "finished", "", 60, 60))
    assert sorted(offline_steps(folder.path, ID)) == list(range(1, 61))


def test_a_service_of_an_ancestor_is_left_alone(tmp_path: Path, config: Config) -> None:
    """WANDB_SERVICE names a W&B process that ends with whoever started this run."""
    folder = open_folder(tmp_path / "run")
    sink = make_wandb_sink(config, folder, ID, environment(tmp_path, WANDB_SERVICE="3-1-unix-/nowhere/socket"))
    write_rows(folder, sink, 1, 5)
    sink.close(Outcome(1, "finished", "", 5, 5))
    assert sorted(offline_steps(folder.path, ID)) == list(range(1, 6))


@pytest.mark.parametrize("content", [b"machine \xff\xfe login", b"machine", None])
def test_a_netrc_that_can_not_be_read_is_no_key(content: bytes | None, tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    if content is None:
        netrc.mkdir()
    else:
        netrc.write_bytes(content)
    assert choose_mode("auto", {"HOME": str(tmp_path)}) == "offline"


def test_no_home_and_no_passwd_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.delenv("HOME", raising=False)
    assert choose_mode("auto", {}) == "offline"


def test_offline_rows_keep_their_values(tmp_path: Path, config: Config) -> None:
    folder = open_folder(tmp_path / "run")
    sink = make_wandb_sink(config, folder, ID, environment(tmp_path))
    write_rows(folder, sink, 1, 3)
    sink.close(Outcome(1, "finished", "", 3, 3))
    rows = offline_rows(folder.path, ID)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["loss"] == 1.0 and rows[1]["loss"] != rows[1]["loss"]


def test_online_goes_on_where_the_server_is(tmp_path: Path, config: Config) -> None:
    folder = open_folder(tmp_path / "run")
    with WandbStub() as stub:
        environ = environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
        for first, last in ((1, 8), (5, 12)):
            sink = make_wandb_sink(config, folder, ID, environ)
            write_rows(folder, sink, first, last)
            sink.close(Outcome(1, "finished", "", last, last))
        assert stub.runs[ID].steps() == list(range(1, 13))
        assert stub.runs[ID].exit_code == 0
    assert Cursor(folder).server_step == 12
    for path in folder.path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), f"the key is in {path}"


# tests/slurm/test_survival.py has a run online that is preempted and hangs, every day.
@pytest.mark.prove
def test_online_kill_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """kill -9 before W&B has uploaded, resume from an earlier step: the server has each step once, in order."""
    with WandbStub() as stub:
        environ = environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
        folder = tmp_path / "run"
        kill_after_step(writer(folder, 0, 80, 0.05, environ), 50)
        _, errors = writer(folder, 40, 70, 0.0, environ).communicate(timeout=60)
        assert stub.runs[ID].steps() == list(range(1, 71)), errors


def test_offline_rows_reach_the_server_once(tmp_path: Path, config: Config) -> None:
    """An offline attempt, then an online one: the server gets all, and `wandb sync` is told that nothing is left."""
    folder = open_folder(tmp_path / "run")
    sink = make_wandb_sink(config, folder, ID, environment(tmp_path))
    write_rows(folder, sink, 1, 4)
    sink.close(Outcome(1, "preempted", "", 4, 4))
    with WandbStub() as stub:
        environ = environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
        sink = make_wandb_sink(config, folder, ID, environ)
        write_rows(folder, sink, 5, 6)
        sink.close(Outcome(2, "finished", "", 6, 6))
        assert stub.runs[ID].steps() == [1, 2, 3, 4, 5, 6]
    assert len(list(folder.wandb.glob("offline-run-*/*.synced"))) == 1


def test_errors_of_the_server_delay_nothing_and_lose_nothing(tmp_path: Path, config: Config) -> None:
    """500s while training; the server comes back: every row arrives, none was waited for."""
    folder = open_folder(tmp_path / "run")
    with WandbStub() as stub:
        environ = environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
        sink = make_wandb_sink(config, folder, ID, environ)
        wait_until(lambda: ID in stub.runs)
        stub.status = 500
        write_rows(folder, sink, 1, 20)
        time.sleep(1.5)
        stub.status = 200
        sink.close(Outcome(1, "finished", "", 20, 20))
        sink = make_wandb_sink(config, folder, ID, environ)
        sink.close(Outcome(2, "finished", "", 20, 20))
        assert stub.runs[ID].steps() == list(range(1, 21))


def test_refused_connection_writes_offline(tmp_path: Path, config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """The server says no at the start: an offline segment, one warning, no key in it."""
    folder = open_folder(tmp_path / "run")
    with WandbStub() as stub:
        stub.status = 401
        environ = environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
        sink = make_wandb_sink(config, folder, ID, environ)
        write_rows(folder, sink, 1, 5)
        sink.close(Outcome(1, "finished", "", 5, 5))
    assert offline_steps(folder.path, ID) == [1, 2, 3, 4, 5]
    errors = capfd.readouterr().err
    assert errors.count("phalanx: W&B:") == 1 and "offline" in errors and KEY not in errors


def test_a_hanging_server_costs_the_end_its_timeout_at_most(
    tmp_path: Path, config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = open_folder(tmp_path / "run")
    config.metrics.wandb.finish_timeout_s = 1.0
    with WandbStub() as stub:
        stub.hang_s = 30.0
        environ = environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
        sink = make_wandb_sink(config, folder, ID, environ)
        write_rows(folder, sink, 1, 50)
        sink.close(Outcome(1, "finished", "", 50, 50))
    assert "finish_timeout_s = 1" in capfd.readouterr().err
    config.metrics.wandb.finish_timeout_s = 15.0
    sink = make_wandb_sink(config, folder, ID, environment(tmp_path))
    sink.close(Outcome(2, "finished", "", 50, 50))
    assert sorted(offline_steps(folder.path, ID)) == list(range(1, 51))


def test_a_copy_that_dies_is_one_warning(tmp_path: Path, config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    folder = open_folder(tmp_path / "run")
    sink = make_wandb_sink(config, folder, ID, environment(tmp_path))
    assert isinstance(sink, CopySink)
    # As after three deaths.
    sink._restarts_left = 0
    sink._process.kill()
    sink._process.wait()
    write_rows(folder, sink, 1, 5)
    sink.close(Outcome(1, "finished", "", 5, 5))
    assert capfd.readouterr().err.count("phalanx: W&B:") == 1


def test_w_and_b_missing_is_one_warning(tmp_path: Path, config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "wandb.py").write_text("raise ImportError('no wandb here')\n")
    folder = open_folder(tmp_path / "run")
    sink = make_wandb_sink(config, folder, ID, environment(tmp_path, PYTHONPATH=str(tmp_path / "shadow")))
    write_rows(folder, sink, 1, 3)
    sink.close(Outcome(1, "finished", "", 3, 3))
    errors = capfd.readouterr().err
    assert errors.count("phalanx: W&B:") == 1 and "no wandb here" in errors


def test_killed_rank_leaves_no_process(tmp_path: Path) -> None:
    """After SIGKILL of rank 0 the copy and wandb-core go by themselves."""
    process = writer(tmp_path / "run", 0, 1000, 0.05, environment(tmp_path, PHALANX_TEST_MARK=str(tmp_path)))
    mark = f"PHALANX_TEST_MARK={tmp_path}".encode()
    kill_after_step(process, 40)
    wait_until(lambda: not marked(mark), 20.0)


def test_mode_auto_is_online_exactly_with_a_key(tmp_path: Path) -> None:
    assert choose_mode("auto", {"HOME": str(tmp_path)}) == "offline"
    assert choose_mode("auto", {"HOME": str(tmp_path), "WANDB_API_KEY": KEY}) == "online"
    assert choose_mode("auto", {"HOME": str(tmp_path), "WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}) == "offline"
    assert choose_mode("offline", {"WANDB_API_KEY": KEY}) == "offline"
    with_key = {"HOME": str(tmp_path), "WANDB_API_KEY": KEY}
    assert choose_mode("auto", {**with_key, "WANDB_MODE": "dryrun"}) == "offline"
    assert choose_mode("auto", {**with_key, "WANDB_MODE": "Off line"}) == "offline"
    assert choose_mode("auto", {**with_key, "WANDB_DISABLED": "true"}) == "disabled"
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    netrc.chmod(0o600)
    assert choose_mode("auto", {"HOME": str(tmp_path)}) == "online"
    assert choose_mode("auto", {"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    netrc.write_text("machine\n")
    assert choose_mode("auto", {"HOME": str(tmp_path)}) == "offline"


def test_disabled_or_unlisted_is_a_null_sink(tmp_path: Path, config: Config) -> None:
    config.metrics.wandb.mode = "disabled"
    assert isinstance(make_wandb_sink(config, RunFolder(tmp_path), ID, {}), NullSink)
    config.metrics.wandb.mode = "auto"
    config.metrics.sinks = ["console", "jsonl"]
    assert isinstance(make_wandb_sink(config, RunFolder(tmp_path), ID, {}), NullSink)


def test_spans_round_trip() -> None:
    steps = {1, 2, 3, 7, 9, 10}
    assert to_spans(steps) == [[1, 3], [7, 7], [9, 10]]
    assert from_spans(to_spans(steps)) == steps
    assert json.loads(json.dumps(to_spans(steps))) == to_spans(steps)


def wait_until(true: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it didn't come true in time"
        time.sleep(0.05)


def marked(mark: bytes) -> list[int]:
    """Processes with this in their environment."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if mark in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found
