"""Watches one node's ranks for a hang. In: their beats. Out: how they stand; once hung, with their stacks.

Torch-free.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launch.watch.heartbeats import HeartbeatReader, RankState, WatchPolicy, hung
from launch.watch.stacks import collect_stacks


class HangWatch:
    """Call `look` every second or so. `states`, `hung` and `stacks` (text, all threads) are what it saw last."""

    def __init__(self, folder: Path, policy: WatchPolicy, node: str) -> None:
        self._folder, self._policy = folder, policy
        self._watch = HeartbeatReader(folder, policy, node)
        self._frames: dict[int, tuple[str, ...]] = {}
        self.states: list[RankState] = []
        self.hung = False
        self.stacks = ""

    def look(self) -> bool:
        """True when hung has begun or ended. Takes seconds when it begins: the ranks are asked for their stacks."""
        before = self.hung
        self.states = self._watch.look()
        self.hung = hung(self.states, self._policy)
        if self.hung and not before and self._policy.stacks:
            found, self.stacks = collect_stacks(self._folder, self.states)
            self._frames = {state.rank: state.frames for state in found}
            # A rank that went on meanwhile was only slow.
            self.states = self._watch.look()
            self.hung = hung(self.states, self._policy)
        if self.hung:
            self.states = [replace(state, frames=self._frames.get(state.rank, ())) for state in self.states]
        return self.hung != before
