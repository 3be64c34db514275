"""Watches one node's ranks for a hang. In: the ranks' heartbeats. Out: the ranks' states and, during a hang, their stacks.

Torch-free.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launch.watch.heartbeats import HeartbeatReader, RankState, WatchPolicy, hung
from launch.watch.stacks import collect_stacks


class HangWatch:
    """Detects when the ranks of one node begin and cease to hang. Call `look` about once a second.

    `states`, `hung` and `stacks` are the result of the last look. `stacks` is text with the stacks of all threads.
    """

    def __init__(self, folder: Path, policy: WatchPolicy, node: str) -> None:
        self._folder, self._policy = folder, policy
        self._watch = HeartbeatReader(folder, policy, node)
        self._frames: dict[int, tuple[str, ...]] = {}
        self.states: list[RankState] = []
        self.hung = False
        self.stacks = ""

    def look(self) -> bool:
        """Read the heartbeats again. True: `hung` has changed.

        The call takes seconds when a hang begins, because it asks the ranks for their stacks.
        """
        before = self.hung
        self.states = self._watch.look()
        self.hung = hung(self.states, self._policy)
        if self.hung and not before and self._policy.stacks:
            found, self.stacks = collect_stacks(self._folder, self.states)
            self._frames = {state.rank: state.frames for state in found}
            # A rank that made progress while the stacks were collected was only slow.
            self.states = self._watch.look()
            self.hung = hung(self.states, self._policy)
        if self.hung:
            self.states = [replace(state, frames=self._frames.get(state.rank, ())) for state in self.states]
        return self.hung != before
