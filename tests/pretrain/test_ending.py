"""The end of an attempt: one outcome, written after the rows are on the disk and before what may take long."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint.restore import TrainingPosition
from pretrain.ending import AttemptEnding, TrainingEnd
from pretrain.run.attempt import Attempt, open_attempt
from pretrain.run.folder import Outcome, RunFolder
from pretrain.run.lock import live_holder


class Opened:
    """Something that an attempt opened; notes what is asked of it, and whether the outcome was there."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.asked: list[tuple[str, bool]] = []

    def sync(self) -> None:
        self.asked.append(("sync", self.folder.outcome.exists()))

    def close(self, outcome: Outcome) -> None:
        self.asked.append(("close", self.folder.outcome.exists()))


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return open_attempt(RunFolder(tmp_path / "run"), "run: {}\n", {}, {})


def test_the_outcome_is_written_once_between_sync_and_close(attempt: Attempt) -> None:
    ending, opened = AttemptEnding(attempt), Opened(attempt.folder)
    ending.close_at_end(opened)
    ending.write(TrainingEnd("finished", "all 3 steps are done", TrainingPosition(3, 24, 768)))
    ending.write_failure("a second end")
    assert opened.asked == [("sync", False), ("close", True)]
    outcome = attempt.folder.read_outcome()
    assert outcome and (outcome.state, outcome.step, outcome.consumed_samples) == ("finished", 3, 24)
    assert attempt.folder.done_step() == 3 and live_holder(attempt.folder) is None


def test_a_failure_names_the_position_that_was_restored(attempt: Attempt) -> None:
    ending = AttemptEnding(attempt)
    ending.restored_position = TrainingPosition(2, 16, 512)
    ending.write_failure("ValueError: no")
    outcome = attempt.folder.read_outcome()
    assert outcome and (outcome.state, outcome.why, outcome.step) == ("failed", "ValueError: no", 2)


def test_records_that_are_opened_after_the_end_are_our_own_bug(attempt: Attempt) -> None:
    ending = AttemptEnding(attempt)
    ending.write_failure("over")
    with pytest.raises(AssertionError, match="open the records before"):
        ending.close_at_end(Opened(attempt.folder))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    ending, opened = AttemptEnding(None), Opened(RunFolder(tmp_path))
    ending.close_at_end(opened)
    ending.write_failure("over")
    assert opened.asked == [] and list(tmp_path.iterdir()) == []
