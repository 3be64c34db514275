"""Commands after a save: beside the training, the newest checkpoint next, ended or waited for at the end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pretrain.checkpoint.after_save import AfterSave
from pretrain.run.folder import Outcome, RunFolder

OF_A_RANK = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "PATH": "/usr/bin:/bin"}


def outcome(state: str) -> Outcome:
    return Outcome(1, state, "", 3, 3)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_of_the_saves_meanwhile_the_newest_is_next_and_the_end_waits(tmp_path: Path) -> None:
    ran, go = tmp_path / "ran", tmp_path / "go"
    command = f"echo $PHALANX_STEP $(basename $PHALANX_CHECKPOINT) >> {ran}; until [ -e {go} ]; do sleep 0.01; done; env"
    after = AfterSave([command, f"echo second >> {ran}"], 30, RunFolder(tmp_path / "run"), OF_A_RANK)
    began = time.monotonic()
    after.saved(tmp_path / "step_1", 1)
    wait_for(ran)
    for step in (2, 3, 4):
        after.saved(tmp_path / f"step_{step}", step)
    assert time.monotonic() - began < 10 and ran.read_text() == "1 step_1\n"
    go.touch()
    after.close(outcome("finished"))
    assert ran.read_text().splitlines() == ["1 step_1", "second", "4 step_4", "second"]
    log = (tmp_path / "run" / "logs" / "after_save" / "step_0000004.log").read_text()
    assert f"PHALANX_RUN_DIR={tmp_path / 'run'}" in log and "RANK" not in log and "MASTER" not in log and "ELASTIC" not in log


def test_a_stopped_run_ends_the_commands_and_their_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    command = f"(echo $BASHPID > {child}.part; mv {child}.part {child}; sleep 100) & wait"
    after = AfterSave([command, f"touch {tmp_path}/more"], 60, RunFolder(tmp_path / "run"), OF_A_RANK)
    after.saved(tmp_path / "step_1", 1)
    wait_for(child)
    began = time.monotonic()
    after.close(outcome("preempted"))
    assert time.monotonic() - began < 10 and not (tmp_path / "more").exists()
    pid = int(child.read_text())
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_failing_and_an_endless_command_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = AfterSave(["echo broken; exit 3", "sleep 100"], 0.5, RunFolder(tmp_path / "run"), OF_A_RANK)
    after.saved(tmp_path / "step_7", 7)
    deadline = time.monotonic() + 20
    told = ""
    while "not done after 0.5 s" not in told:
        told += capsys.readouterr().err
        assert time.monotonic() < deadline, told
        time.sleep(0.05)
    assert "exit 3: exit code 3" in told and "step_0000007.log" in told
    after.close(outcome("finished"))
    assert (tmp_path / "run" / "logs" / "after_save" / "step_0000007.log").read_text() == "broken\n"


def test_a_run_without_commands_starts_no_thread(tmp_path: Path) -> None:
    after = AfterSave([], 60, RunFolder(tmp_path / "run"), {})
    after.saved(tmp_path / "step_1", 1)
    after.close(outcome("finished"))
    assert not (tmp_path / "run").exists()
