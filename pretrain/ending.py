"""The end of an attempt: the outcome is written once, and what was opened is closed. In: `TrainingEnd`. Out: outcome.json."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

from configs.errors import ConfigError
from pretrain.checkpoint.restore import TrainingPosition
from pretrain.metrics.goodput import read_goodput
from pretrain.run.attempt import Attempt
from pretrain.run.folder import Outcome


@dataclass(frozen=True)
class TrainingEnd:
    """How training ended. `state`: one of STATES in pretrain/run/folder.py. `why`: one line for people."""

    state: str
    why: str
    position: TrainingPosition


class ClosesAtEnd(Protocol):
    """What the end of an attempt syncs before the outcome is written, and closes after it."""

    def sync(self) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


class AttemptEnding:
    """Ends rank 0's attempt exactly once. On the other ranks `attempt` is None, and there is nothing to write.

    `restored_position`: where the engine was last restored; the outcome of a failure names this position, because no later
    one is known to be safe on the disk.
    """

    def __init__(self, attempt: Attempt | None) -> None:
        self.restored_position = TrainingPosition()
        self._attempt = attempt
        self._to_close: list[ClosesAtEnd] = []
        self._is_written = False

    def close_at_end(self, opened: ClosesAtEnd) -> None:
        """Hand over what was opened for this attempt. Closed in the order of these calls."""
        assert not self._is_written, "the attempt has ended; open the records before Session.finish"
        self._to_close.append(opened)

    def write(self, ended: TrainingEnd) -> TrainingEnd:
        """Sync the records, write the outcome, close everything, and free the run folder. A second call does nothing.

        Returns the end that was written: "failed" when the disk refuses the records. Raises ConfigError when it refuses the
        outcome too; everything is closed then.
        """
        attempt = self._attempt
        if attempt is None or self._is_written:
            return ended
        self._is_written = True
        try:
            for opened in self._to_close:
                opened.sync()
        except ConfigError as error:
            ended = replace(ended, state="failed", why=f"{ended.why}; the record is not whole: {error.problems[0].rule}")
        outcome = self.outcome(ended, attempt)
        try:
            found = read_goodput(attempt.folder, time.time())
            # The outcome comes first: closing W&B may take longer than a scheduler waits.
            attempt.finish(outcome, **({"goodput": found.as_dict()} if found else {}))
        finally:
            try:
                for opened in self._to_close:
                    opened.close(outcome)
            finally:
                attempt.close()
        return ended

    def write_failure(self, why: str) -> None:
        """The outcome "failed", unless an outcome was written."""
        self.write(TrainingEnd("failed", why, self.restored_position))

    def outcome(self, ended: TrainingEnd, attempt: Attempt) -> Outcome:
        position = ended.position
        return Outcome(attempt.number, ended.state, ended.why, position.step, position.consumed_samples)
