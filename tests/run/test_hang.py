"""A rank that stops in the middle of training: the launcher names it and ends the attempt."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from launch.local.parent_guard import marked_pids
from pretrain.run.files import iterate_lines
from pretrain.run.folder import RunFolder
from tests.run.world import Command, launch


def stop_rank_1(config: Path, folder: RunFolder) -> Command:
    """A launch that has ended because its second rank stood still."""
    command = launch(config, folder.path, "launch.watch.step_timeout_s=4")
    command.wait_for_step(3)
    command.ranks()[1].send_signal(signal.SIGSTOP)
    assert command.end(90) == 1
    return command


def test_a_stopped_rank_is_named(run_config: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "hung")
    command = stop_rank_1(run_config, folder)
    report = command.errors[command.errors.index("hung:") :]
    assert report.startswith("hung: rank 1 on ") and "stopped (SIGSTOP) in step " in report
    assert "1 other (rank 0): step " in report, "where the other rank waits"
    assert "0" in report and "pretrain/loop.py" in (folder.log_dir(1) / "stacks.txt").read_text()
    mark = json.loads((folder.launch_dir(1) / "launcher.json").read_text())["mark"]
    assert marked_pids(mark) == []
    outcome = folder.read_outcome()
    assert outcome is not None and outcome.state == "failed" and outcome.why == report.splitlines()[0] and outcome.step >= 3
    kinds = [row["kind"] for _, row in iterate_lines(folder.events) if row]
    assert kinds[-2:] == ["hung", "outcome"]
