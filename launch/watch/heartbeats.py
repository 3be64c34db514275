"""Decides whether ranks hang. In: the heartbeats of a node's ranks. Out: each rank's phase and its age, and the verdict.

A rank waits only for ranks that are behind it. A run is therefore hung when all ranks that are furthest behind have exceeded
the timeout of their phase. How long the other ranks wait is no sign of a hang: they may wait while rank 0 saves. A run is also
hung when the process of any rank has been unable to move for longer than the timeout of a step, whatever the rank's phase.

Torch-free.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from configs.schema import Config
from launch.watch.processes import STUCK, state_of, waits_in_kernel
from parallel.layout import world_size
from pretrain.run.beat import ENDING, OF_A_STEP, PHASES, Beat, decode
from pretrain.run.files import read_json, write_atomically

# The timeout if step_timeout_s is not set: this many median step times, but at least _LEAST_TIMEOUT_S.
_STEPS_PER_TIMEOUT = 20
_LEAST_TIMEOUT_S = 300.0
# A longer pause between two looks means that the machine or the job was suspended. All ages then start again from zero.
# Collecting stacks takes less time than this.
_GAP_S = 30.0
# Each node writes a report every 2 s. On large runs the interval grows, so that all nodes together write 50 reports a second.
_REPORT_S = 2.0
_REPORTS_PER_S = 50
MISSING = -1


@dataclass(frozen=True)
class WatchPolicy:
    """The part of the config that a node's agent needs: the keys of launch.watch and the size of the run.

    Timeouts and `report_interval_s` are in seconds. `step_timeout_s` None: derived from the measured step time; 0: no timeout.
    `start_timeout_s` 0: no timeout. `straggler_ratio`: the multiple of the median from which a rank is slow; None: no search.
    `gather`: write one log per node instead of one per rank.
    """

    step_timeout_s: float | None
    start_timeout_s: float
    stacks: bool
    straggler_ratio: float | None
    gather: bool
    report_interval_s: float
    nodes: int
    processes_per_node: int

    def to_json(self) -> str:
        """The policy as one line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WatchPolicy:
        """The policy that `to_json` wrote. Raises ValueError if `text` is not JSON or has other keys."""
        value = json.loads(text)
        names = {item.name for item in fields(WatchPolicy)}
        if not isinstance(value, dict) or set(value) != names:
            raise ValueError(f"a policy has exactly the keys {', '.join(sorted(names))}")
        return WatchPolicy(**value)


def make_watch_policy(config: Config) -> WatchPolicy:
    """The policy of a config. On large runs the report interval grows with the number of nodes."""
    watch, launch = config.launch.watch, config.launch
    return WatchPolicy(
        step_timeout_s=watch.step_timeout_s,
        start_timeout_s=watch.start_timeout_s,
        stacks=watch.stacks,
        straggler_ratio=watch.straggler_ratio,
        gather=world_size(config) > watch.per_rank_files_max,
        report_interval_s=max(_REPORT_S, launch.nodes / _REPORTS_PER_S),
        nodes=launch.nodes,
        processes_per_node=launch.processes_per_node,
    )


@dataclass(frozen=True)
class RankState:
    """A rank's state as seen from outside its process.

    `rank`: MISSING stands for a process that has written no heartbeat yet. `age_s`: how long the rank has been in its phase.
    `step_time_s`, `batch_wait_s` and `probe_s`: medians over the last steps; None: not measured yet. `rollbacks`: how often the
    run returned to an earlier step. `process`: the state by launch/watch/processes.py. `stuck_s`: how long the process has been
    unable to move. `kernel`: the kernel function in which the process sleeps. `frames`: the main thread's stack, innermost
    frame first; empty until the stacks are collected. All times are in seconds.
    """

    rank: int
    node: str
    pid: int
    phase: str
    step: int
    age_s: float
    step_time_s: float | None = None
    batch_wait_s: float | None = None
    probe_s: float | None = None
    rollbacks: int = 0
    process: str = "alive"
    stuck_s: float = 0.0
    kernel: str = ""
    frames: tuple[str, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether the process ended after its last phase. Such a rank ended in good order, and no other rank waits for it."""
        return self.phase == ENDING and self.process in ("gone", "zombie")

    @property
    def position(self) -> tuple[int, int, int]:
        """The rank's progress as (rollbacks, step, index of the phase). The smallest value is furthest behind."""
        return self.rollbacks, self.step, PHASES.index(self.phase) if self.phase in PHASES else -1


@dataclass(frozen=True)
class NodeReport:
    """The last report of a node's agent.

    `time`: when the report was written, in seconds since the epoch by the node's clock. `pid`: the agent's. `exit_code`:
    torchrun's; None: torchrun still runs. `hung`: the verdict over this node's ranks alone, which may wait for ranks of other
    nodes. `failures`: the fields of launch/watch/failures.py's `Failure`. `silent_s`: for how many seconds the reader has seen
    no newer report.
    """

    host: str
    time: float
    pid: int
    exit_code: int | None
    hung: bool
    ranks: tuple[RankState, ...]
    failures: tuple[dict[str, Any], ...] = ()
    silent_s: float = 0.0


def timeout_s(state: RankState, policy: WatchPolicy) -> float:
    """How long the rank may stay in its phase, in seconds. Infinite: there is no timeout."""
    is_known = state.phase in OF_A_STEP and state.step_time_s is not None
    return step_timeout_s(state, policy) if is_known else policy.start_timeout_s or float("inf")


def step_timeout_s(state: RankState, policy: WatchPolicy) -> float:
    """How long a phase of a step may last, and how long a process may be stopped, in seconds. Infinite: there is no timeout."""
    if policy.step_timeout_s is None:
        return max(_LEAST_TIMEOUT_S, _STEPS_PER_TIMEOUT * (state.step_time_s or 0.0))
    return policy.step_timeout_s or float("inf")


def hung(states: Sequence[RankState], policy: WatchPolicy) -> bool:
    """The verdict by the rule in this module's docstring. `states`: the ranks of one node or of all nodes.

    Ranks that ended in good order don't count.
    """
    waiting = [state for state in states if not state.has_ended]
    if any(state.stuck_s > step_timeout_s(state, policy) for state in waiting):
        return True
    first = min((state.position for state in waiting), default=None)
    behind = [state for state in waiting if state.position == first]
    return bool(behind) and all(state.age_s > timeout_s(state, policy) for state in behind)


class HeartbeatReader:
    """Reads one node's heartbeats repeatedly. A heartbeat that was read while half written leaves the last whole one in place."""

    def __init__(self, folder: Path, policy: WatchPolicy, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._policy = policy
        self._node = node
        self._clock = clock
        self._beats: dict[int, Beat] = {}
        self._stuck_since_s: dict[int, float] = {}
        # Ages count from the start of this reader at the earliest.
        self._begun_s = self._not_before_s = self._looked_s = clock()

    def look(self) -> list[RankState]:
        """The state of every rank of this node, by rank. Processes without a heartbeat come last, as MISSING."""
        now_s = self._clock()
        if now_s - self._looked_s > _GAP_S:
            self._not_before_s = now_s
        self._looked_s = now_s
        for path in self._folder.glob("rank_*.beat"):
            beat = decode(path.read_bytes())
            if beat is not None:
                self._beats[beat.rank] = beat
        seen = [self._state(beat, now_s) for _, beat in sorted(self._beats.items())]
        age_s = now_s - max(self._begun_s, self._not_before_s)
        missing = max(0, self._policy.processes_per_node - len(seen))
        seen += [RankState(MISSING, self._node, 0, "not started", 0, age_s) for _ in range(missing)]
        return seen

    def _state(self, beat: Beat, now_s: float) -> RankState:
        process = state_of(beat.pid, beat.start_ticks)
        if process not in STUCK:
            self._stuck_since_s.pop(beat.rank, None)
        since_s = self._stuck_since_s.setdefault(beat.rank, now_s) if process in STUCK else now_s
        return RankState(
            rank=beat.rank,
            node=self._node,
            pid=beat.pid,
            phase=beat.phase,
            step=beat.step,
            age_s=round(max(0.0, now_s - max(beat.since_s, self._not_before_s)), 3),
            rollbacks=beat.rollbacks,
            stuck_s=round(now_s - max(since_s, self._not_before_s), 3) if process in STUCK else 0.0,
            step_time_s=beat.step_time_s,
            batch_wait_s=beat.batch_wait_s,
            probe_s=beat.probe_s,
            process=process,
            kernel=waits_in_kernel(beat.pid),
        )


def report_path(attempt_dir: Path, host: str) -> Path:
    """The file of a node's report. `attempt_dir`: the launch folder of the attempt."""
    return attempt_dir / "nodes" / f"{host}.json"


def write_report(attempt_dir: Path, report: NodeReport) -> None:
    """Replace the node's report. Raises OSError if it can't be written.

    The report is not forced to the disk, because the next one follows within seconds.
    """
    path = report_path(attempt_dir, report.host)
    write_atomically(path, json.dumps(asdict(report)) + "\n", durable=False)


def read_reports(attempt_dir: Path) -> list[NodeReport]:
    """The newest report of each node, sorted by host. Files that hold no report are left out."""
    folder = attempt_dir / "nodes"
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        return []
    return [report for name in names if (report := _parse(read_json(folder / name))) is not None]


class ReportReader:
    """Reads all nodes' reports repeatedly and measures, by its own clock, how long each node has been silent."""

    def __init__(self, attempt_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempt_dir = attempt_dir
        self._clock = clock
        # host → (the time in its newest report, when this reader first saw that report)
        self._news: dict[str, tuple[float, float]] = {}

    def read(self) -> list[NodeReport]:
        """The result of `read_reports` with `silent_s` filled in."""
        return [replace(report, silent_s=self._silent_s(report)) for report in read_reports(self._attempt_dir)]

    def _silent_s(self, report: NodeReport) -> float:
        now_s = self._clock()
        said, seen_s = self._news.get(report.host, (None, now_s))
        if said != report.time:
            seen_s = now_s
        self._news[report.host] = (report.time, seen_s)
        return round(now_s - seen_s, 3)


def _parse(value: Any) -> NodeReport | None:
    """The report in a JSON value. None: another program or another version wrote the value."""
    try:
        ranks = tuple(RankState(**{**rank, "frames": tuple(rank["frames"])}) for rank in value["ranks"])
        return NodeReport(**{**value, "ranks": ranks, "failures": tuple(value["failures"])})
    except (TypeError, KeyError):
        return None
