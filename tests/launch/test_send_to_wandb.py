"""`phalanx wandb`: what W&B lacks of a run is sent afterwards, each step once, into the same W&B run."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.load import to_yaml
from configs.schema import Config
from launch.status import read_status
from launch.status_text import describe
from pretrain.metrics.wandb_sink import make_wandb_sink
from pretrain.metrics.wandb_steps import Cursor, read_copy_state
from pretrain.run.attempt import open_attempt
from pretrain.run.folder import Outcome, RunFolder
from pretrain.run.record import Record
from tests.pretrain.metrics.test_wandb import environment, write_rows
from tests.tmpfs import mounted_tmpfs
from tests.wandb_read import offline_steps
from tests.wandb_stub import KEY, WandbStub
from tools.cli import run as phalanx


@pytest.fixture
def config() -> Config:
    config = Config()
    config.run.name, config.run.steps = "sent", 6
    config.metrics.wandb.finish_timeout_s = 20.0
    return config


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    """A server; this process has no key and knows no W&B of this machine."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    for name, value in (("HOME", str(tmp_path)), ("WANDB_ERROR_REPORTING", "false")):
        monkeypatch.setenv(name, value)
    with WandbStub() as server:
        yield server


def train(folder: RunFolder, config: Config, first: int, last: int, environ: dict[str, str], copied: int) -> str:
    """An attempt that records the steps `first` to `last`. Its copy dies after step `copied`. Returns the W&B id."""
    config.run.dir = str(folder.path)
    with open_attempt(folder, to_yaml(config), {}, environ) as attempt:
        if copied >= first:
            sink = make_wandb_sink(config, folder, attempt.wandb_id, environ)
            write_rows(folder, sink, first, copied)
            sink.close(Outcome(attempt.number, "stopped", "", copied, copied))
        write_rows(folder, Nobody(), max(first, copied + 1), last)
        attempt.finish(Outcome(attempt.number, "finished", "", last, last))
        return attempt.wandb_id


class Nobody:
    def write(self, row: dict[str, Any]) -> None:
        return


def sent(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = phalanx(["wandb", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_an_offline_run_whose_copy_died_is_sent_as_one_run(
    tmp_path: Path, config: Config, stub: WandbStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First without a key, to an offline file; then with one. Once more sends nothing."""
    folder = RunFolder(tmp_path / "run")
    wandb_id = train(folder, config, 1, 6, environment(tmp_path), copied=3)
    status = read_status(folder, is_whole=True)
    assert status.wandb == {"wandb_id": wandb_id, "mode": "offline", "lacking_steps": 6, "in_files_steps": 3}
    assert f"lacks 6 of 6 steps, 3 of them in offline files; phalanx wandb {folder.path} sends them" in describe(status)
    run = str(folder.path)
    assert sent(capsys, run, "--dry-run")[0] == 0 and offline_steps(folder.path, wandb_id) == [1, 2, 3]

    code, document = sent(capsys, run)
    assert (code, document["lacking_steps"], document["in_files_steps"]) == (0, 6, 6)
    assert sorted(offline_steps(folder.path, wandb_id)) == [1, 2, 3, 4, 5, 6]
    assert "offline, files have all steps" in describe(read_status(folder, is_whole=True))

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", stub.url)
    code, document = sent(capsys, run)
    assert code == 0 and document == {
        "run_dir": run, "steps": 6, "lacking_before_steps": 6, "wandb_id": wandb_id, "mode": "online", "lacking_steps": 0,
        "in_files_steps": 0,
    }  # fmt: skip
    assert phalanx(["wandb", run]) == 0 and f"W&B run {wandb_id} of project phalanx has all 6 steps" in capsys.readouterr().out
    assert list(stub.runs) == [wandb_id] and stub.runs[wandb_id].steps() == [1, 2, 3, 4, 5, 6]
    assert stub.runs[wandb_id].exit_code == 0
    summary = json.loads(stub.runs[wandb_id].summary)
    assert summary["step"] == 6 and 0 <= summary["goodput"]["ratio"] <= 1 and summary["goodput"]["startup_s"] > 0
    assert "W&B      has all steps" in describe(read_status(folder, is_whole=True))


def test_a_server_that_refuses_is_exit_code_1(
    tmp_path: Path, config: Config, stub: WandbStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    wandb_id = train(folder, config, 1, 6, environment(tmp_path), copied=0)
    (folder.wandb / "lock").touch()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", stub.url)
    stub.status = 401
    code, document = sent(capsys, str(folder.path))
    assert (code, document["lacking_steps"]) == (1, 6)
    assert offline_steps(folder.path, wandb_id) == [] and stub.runs == {}
    # W&B's own library ends such a run without an error.
    stub.status, stub.stream_status = 200, 403
    code, document = sent(capsys, str(folder.path))
    assert (code, document["lacking_steps"]) == (1, 6) and stub.runs[wandb_id].steps() == []
    assert "W&B      lacks 6 of 6 steps; phalanx wandb" in describe(read_status(folder, is_whole=True))


def test_the_end_of_a_run_sends_what_the_server_refused_at_its_start(
    tmp_path: Path, config: Config, stub: WandbStub, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.wandb.mkdir(parents=True)
    environ = environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    stub.status = 401
    sink = make_wandb_sink(config, folder, "late", environ)
    write_rows(folder, sink, 1, 5)
    while not offline_steps(folder.path, "late"):
        pass
    stub.status = 200
    sink.close(Outcome(1, "finished", "", 5, 5))
    assert stub.runs["late"].steps() == [1, 2, 3, 4, 5]
    folder.wandb_id.write_text("late\n")
    state = read_copy_state(folder, 5, is_live=False)
    assert state is not None and (state.mode, state.lacking_steps) == ("online", 0)
    assert capfd.readouterr().err.count("phalanx: W&B:") == 1


def test_what_may_not_be_sent_is_refused(
    tmp_path: Path, config: Config, stub: WandbStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """No run, no W&B, a live run, another sender."""
    folder = RunFolder(tmp_path / "run")
    train(folder, config, 1, 3, environment(tmp_path), copied=0)
    run = str(folder.path)

    def refusal(*words: str) -> str:
        code, document = sent(capsys, *words)
        assert code == 2
        return document["problems"][0]["rule"]

    assert "must be a run folder" in refusal(str(tmp_path / "nowhere"))
    assert "no copy in W&B" in refusal(run, "metrics.wandb.mode=disabled")
    assert "no copy in W&B" in refusal(run, "metrics.sinks=[jsonl]")
    with open(folder.wandb / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another one does it now" in refusal(run)
    with open_attempt(folder, to_yaml(config), {}, {}):
        assert "its own copy sends the rows" in refusal(run)


def test_a_damaged_cursor_is_no_cursor(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_copy_state(folder, 5, is_live=False) is None, "nothing was ever copied"
    folder.wandb.mkdir()
    (folder.wandb / "lock").touch()
    folder.wandb_id.write_bytes(b"\xff\n")
    for text in (
        "[]",
        '{"segments": 3, "server_step": "x"}',
        '{"segments": {"run-1": [[1]], "run-2": "abc", "run-3": [["a", 1]]}}',
    ):
        (folder.wandb / "cursor.json").write_text(text)
        assert Cursor(folder).segments == {}
        state = read_copy_state(folder, 5, is_live=False)
        assert state is not None and state.lacking_steps == 5
    (folder.wandb / "cursor.json").write_text('{"segments": {"run-1": [[-9, -5], [9, 3], [4, 900000000000]]}, "server_step": 2}')
    live = read_copy_state(folder, 5, is_live=True)
    assert live is not None and live.lacking_steps == 1, "an online file is sent as it grows"
    assert read_copy_state(folder, 10**18, is_live=False) is None


@pytest.mark.prove
def test_a_disk_that_fills_up_under_w_and_b_loses_nothing(
    tmp_path: Path, config: Config, stub: WandbStub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """W&B reports no full disk. Offline and online, the copy tells it, claims nothing, and `phalanx wandb` sends the rest."""
    for mode in ("offline", "online"):
        with mounted_tmpfs(tmp_path / mode, "4m") as disk:
            folder = RunFolder(disk / "run")
            online = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": stub.url}
            wandb_id = train(folder, config, 1, 2, environment(tmp_path), copied=0)
            environ = environment(tmp_path, **(online if mode == "online" else {}))
            sink = make_wandb_sink(config, folder, wandb_id, environ)
            write_rows(folder, sink, 1, 100)
            while not (folder.wandb / "cursor.json").exists():
                time.sleep(0.1)
            with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
                while True:
                    filler.write(b"x" * 4096)
            record = Record.open(folder.metrics, 100, lambda kind, **fields: None)
            for step in range(101, 401):
                record.append({"step": step, "loss": 1.0, "grad_norm": 1.0, "tokens": step})
                sink.write({})
            (disk / "filler").unlink()
            record.close()
            sink.close(Outcome(1, "finished", "", 400, 400))
            assert mode == "online" or sorted(offline_steps(folder.path, wandb_id)) == list(range(1, 401))
            for name, value in online.items():
                monkeypatch.setenv(name, value)
            assert phalanx(["wandb", str(folder.path)]) == 0, capfd.readouterr().err
            assert stub.runs[wandb_id].steps() == list(range(1, 401)), mode
            for name in online:
                monkeypatch.delenv(name)
