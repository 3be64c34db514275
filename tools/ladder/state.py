"""How a ladder stands. In: a `Ladder`. Out: the `RunStatus` of each point, as text or plain data.

Torch-free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from launch.status import RunStatus, read_status
from launch.status_text import table
from pretrain.run.files import storage_problem
from pretrain.run.folder import RunFolder, has_begun
from tools.ladder.ladder_file import Ladder, Point

NOT_STARTED = "not started"


@dataclass(frozen=True)
class PointState:
    """A point and its run's status. The state `not started`: no launch has reached this point."""

    point: Point
    status: RunStatus

    @property
    def begun(self) -> bool:
        return self.status.state != NOT_STARTED

    @property
    def finished(self) -> bool:
        return self.status.state == "finished"


def read_states(ladder: Ladder) -> list[PointState]:
    """The state of each point, in the ladder's order. Raises ConfigError if a folder can't be read."""
    return [PointState(point, _status(RunFolder(ladder.run_dir(point)))) for point in ladder.points]


def _status(folder: RunFolder) -> RunStatus:
    try:
        if has_begun(folder):
            return read_status(folder)
    except OSError as error:
        raise ConfigError(storage_problem("LADDER", folder.path, error)) from error
    return RunStatus(str(folder.path), NOT_STARTED, "")


def counts(states: Sequence[PointState]) -> dict[str, int]:
    """How many points are in each state, the most frequent first."""
    return dict(Counter(state.status.state for state in states).most_common())


def states_text(ladder: Ladder, states: Sequence[PointState], columns: int | None) -> str:
    """A line for each point, then how many are in each state."""
    lines = table([state.status for state in states], columns)
    summary = ", ".join(f"{number} {name}" for name, number in counts(states).items())
    return "\n".join([*lines, f"{ladder.name}: {len(states)} points: {summary}"])


def states_json(ladder: Ladder, states: Sequence[PointState]) -> dict[str, Any]:
    """The states as plain data."""
    runs = [{"point": state.point.name, "words": list(state.point.words)} | state.status.as_dict() for state in states]
    return {"ladder": ladder.name, "dir": str(ladder.folder), "states": counts(states), "runs": runs}
