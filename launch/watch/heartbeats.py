"""Is a node's part of a run hung? In: the beats of its ranks. Out: what each rank does since when, and a verdict.

Ranks wait for those that are behind them, never for those ahead. So a run is hung when all ranks that are furthest behind
have been in their phase for longer than that phase may last; how long the others wait (for rank 0 that saves) says nothing.
A process that was stopped comes back to nobody, whatever its phase.

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

# Without step_timeout_s: so many median steps, but no less than this.
_STEPS_PER_TIMEOUT = 20
_LEAST_TIMEOUT_S = 300.0
# The watchdog itself did not run for so long (asking for stacks takes less): machine or job were suspended, waiting begins anew.
_GAP_S = 30.0
# A report a node every 2 s; on large runs all nodes together write 50 a second.
_REPORT_S = 2.0
_REPORTS_PER_S = 50
MISSING = -1


@dataclass(frozen=True)
class WatchPolicy:
    """launch.watch, and the size of the run; what a node's agent needs of the config. `gather`: one log a node."""

    step_timeout_s: float | None
    start_timeout_s: float
    stacks: bool
    straggler_ratio: float | None
    gather: bool
    report_interval_s: float
    nodes: int
    processes_per_node: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WatchPolicy:
        """What `to_json` wrote. Raises ValueError: something else."""
        value = json.loads(text)
        names = {item.name for item in fields(WatchPolicy)}
        if not isinstance(value, dict) or set(value) != names:
            raise ValueError(f"a policy has exactly the keys {', '.join(sorted(names))}")
        return WatchPolicy(**value)


def make_watch_policy(config: Config) -> WatchPolicy:
    """Pure."""
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
    """A rank as seen from outside. `rank` MISSING: a process that never beat. `process`: see launch/watch/processes.py.

    `age_s`: how long it has been in its phase. `stuck_s`: how long its process couldn't move. `frames`: its main thread's
    stack, innermost first, once it was asked.
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
        """Gone after its last phase: it ended well, and nobody waits for it."""
        return self.phase == ENDING and self.process in ("gone", "zombie")

    @property
    def position(self) -> tuple[int, int, int]:
        """How far the rank has come."""
        return self.rollbacks, self.step, PHASES.index(self.phase) if self.phase in PHASES else -1


@dataclass(frozen=True)
class NodeReport:
    """What a node's agent last said. `time`: s since the epoch, its own clock. `failures`: {rank, time, kind, text}.

    `exit_code`: torchrun's, once it has ended. `hung`: as far as this node's own ranks can tell; they may wait for others.
    `silent_s`: how long the reader has seen no newer report.
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
    """How long this rank may be in its phase; infinite: for ever."""
    is_known = state.phase in OF_A_STEP and state.step_time_s is not None
    return step_timeout_s(state, policy) if is_known else policy.start_timeout_s or float("inf")


def step_timeout_s(state: RankState, policy: WatchPolicy) -> float:
    """How long a phase of a step may last, and a process be stopped."""
    if policy.step_timeout_s is None:
        return max(_LEAST_TIMEOUT_S, _STEPS_PER_TIMEOUT * (state.step_time_s or 0.0))
    return policy.step_timeout_s or float("inf")


def hung(states: Sequence[RankState], policy: WatchPolicy) -> bool:
    """By the rule above, of ranks of one node or of all. Those that have ended don't count."""
    waiting = [state for state in states if not state.has_ended]
    if any(state.stuck_s > step_timeout_s(state, policy) for state in waiting):
        return True
    first = min((state.position for state in waiting), default=None)
    behind = [state for state in waiting if state.position == first]
    return bool(behind) and all(state.age_s > timeout_s(state, policy) for state in behind)


class HeartbeatReader:
    """Reads one node's beats, again and again, and remembers those that a torn read would lose."""

    def __init__(self, folder: Path, policy: WatchPolicy, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._policy = policy
        self._node = node
        self._clock = clock
        self._beats: dict[int, Beat] = {}
        self._stuck_since_s: dict[int, float] = {}
        # Only what the watchdog has seen itself counts.
        self._begun_s = self._not_before_s = self._looked_s = clock()

    def look(self) -> list[RankState]:
        """Every rank of this node, by rank."""
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
    return attempt_dir / "nodes" / f"{host}.json"


def write_report(attempt_dir: Path, report: NodeReport) -> None:
    """Replace the node's report. Raises OSError. Not forced to the disk: the next one comes in seconds."""
    path = report_path(attempt_dir, report.host)
    write_atomically(path, json.dumps(asdict(report)) + "\n", durable=False)


def read_reports(attempt_dir: Path) -> list[NodeReport]:
    """The newest report of each node, by host. What is no report is left out."""
    folder = attempt_dir / "nodes"
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        return []
    return [report for name in names if (report := _parse(read_json(folder / name))) is not None]


class ReportReader:
    """Reads all nodes' reports again and again, and measures by its own clock for how long each node has been silent."""

    def __init__(self, attempt_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempt_dir = attempt_dir
        self._clock = clock
        # host → (its report's own time, when that was first seen here)
        self._news: dict[str, tuple[float, float]] = {}

    def read(self) -> list[NodeReport]:
        """As `read_reports`, with `silent_s`."""
        return [replace(report, silent_s=self._silent_s(report)) for report in read_reports(self._attempt_dir)]

    def _silent_s(self, report: NodeReport) -> float:
        now_s = self._clock()
        said, seen_s = self._news.get(report.host, (None, now_s))
        if said != report.time:
            seen_s = now_s
        self._news[report.host] = (report.time, seen_s)
        return round(now_s - seen_s, 3)


def _parse(value: Any) -> NodeReport | None:
    """None: another program's file, or another version's."""
    try:
        ranks = tuple(RankState(**{**rank, "frames": tuple(rank["frames"])}) for rank in value["ranks"])
        return NodeReport(**{**value, "ranks": ranks, "failures": tuple(value["failures"])})
    except (TypeError, KeyError):
        return None
