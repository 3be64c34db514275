"""Commands of Slurm, as processes. What Slurm answers is tested on a cluster, in tests/slurm."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launch.slurm.scheduler import SchedulerError, call


def test_a_requeue_does_not_end_the_command_that_asks_for_it() -> None:
    """Slurm sends SIGTERM to all processes of a job that is requeued: to the batch step and to its scontrol."""
    assert call(["sh", "-c", "kill -TERM $$; echo answered"]) == "answered\n"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGTERM not in blocked, "the batch step itself still hears SIGTERM"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sh", "-c", "echo refused >&2; exit 3"], "refused"),
        (["sh", "-c", "kill -KILL $$"], "sh exited with -9"),
        (["a-command-of-nobody"], "a-command-of-nobody is not on this machine's PATH"),
    ],
)
def test_a_command_that_fails_says_why(words: list[str], said: str) -> None:
    with pytest.raises(SchedulerError, match=said):
        call(words)


def test_a_command_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SchedulerError, match=r"gave no answer within 0\.2 s"):
        call(["sh", "-c", "echo $$ > pid; exec sleep 100"], timeout_s=0.2)
    pid = int(Path("pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
