"""Every command that looks into a run folder meets every spoilt one: an answer or one report, and nothing is changed."""

from __future__ import annotations

import os
import shutil
import traceback
from pathlib import Path

import pytest

from tests.launch.broken_folders import BROKEN, make_run
from tools.cli import run as phalanx

COMMANDS = (
    ("status", "RUN"),
    ("report", "RUN", "--out", "OUT/page.html"),
    ("data", "trace", "RUN", "--step", "7"),
    ("data", "trace", "RUN", "--document", "train:1"),
    ("data", "ledger", "RUN"),
    ("plan", "RUN", "--measured"),
    ("plan", "model/tiny_moe", "model.vocab_size=512", "--calibrate", "RUN"),
    ("logs", "RUN"),
    ("wandb", "RUN", "--dry-run"),
    ("resume", "RUN", "--dry-run"),
    ("check", "RUN/config.yaml"),
    ("cancel", "RUN", "--wait", "0"),
)


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {str(path): path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def meet(run: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> list[int]:
    """The exit code of each command."""
    before, codes = tree(run.parent), []
    for words in COMMANDS:
        codes.append(phalanx([word.replace("RUN", str(run)).replace("OUT", str(out)) for word in words]))
        told = capfd.readouterr()
        assert codes[-1] in (0, 2) and "Traceback" not in told.err, (words, told.err)
        assert codes[-1] == 0 or (told.err.startswith(("1 problem", "2 problems")) and "fix:" in told.err), (words, told.err)
        assert tree(run.parent) == before, words
    return codes


@pytest.mark.parametrize("name", BROKEN)
def test_a_spoilt_folder_is_an_answer_or_one_report(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "run"
    BROKEN[name][0](make_run(run))
    meet(run, tmp_path, capfd)


def test_what_is_no_run_folder_is_one_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    assert set(meet(run, tmp_path, capfd)) == {2}
    run.write_text("a file")
    assert set(meet(run, tmp_path, capfd)) == {2}
    run.unlink()
    run.symlink_to(run)
    assert set(meet(run, tmp_path, capfd)) == {2}
    run.unlink()
    (run / "src").mkdir(parents=True)
    assert set(meet(run, tmp_path, capfd)) == {2}
    shutil.rmtree(run / "src")
    assert set(meet(run, tmp_path, capfd)) == {2}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_files_of_somebody_else_are_an_answer_or_one_report(open_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(open_folder / "runs" / "run")
    # What the commands import, an ordinary user may not be able to read.
    meet(run, open_folder, capfd)
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml", "launch", "."):
        (run / name).chmod(0)
        if (child := os.fork()) == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                meet(run, open_folder, capfd)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, (name, capfd.readouterr().err)
        (run / name).chmod(0o755)
