"""Names the ranks that block a hung run, and the slow ranks of a running one. In: ranks' states, or reports. Out: `Triage`.

In a hung run most ranks wait for a few others. The search for those few tries these signs in order: a process that can't
move or never wrote a heartbeat; a rank behind the others in step and phase; a rank that waits in no collective while the
others do. If no sign distinguishes any rank, the text says so.

Torch-free.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.units import duration
from launch.watch.heartbeats import MISSING, NodeReport, RankState, WatchPolicy, hung
from launch.watch.stacks import waits_in
from pretrain.run.beat import WAITING
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.files import last_row, write_json
from pretrain.run.folder import Outcome, RunFolder

_NAMED = 4
_SHOWN_FRAMES = 12
# A node is silent if it sends no report for this many intervals and for at least 30 s. Its agent or its machine is gone.
_SILENT_INTERVALS = 5
_SILENT_S = 30.0
# A wait for data is counted only if it takes more than this fraction of a step.
_WAIT_SHARE = 0.1

_CANT_MOVE = {
    "stopped": "its process is stopped (SIGSTOP)",
    "traced": "its process is held by a debugger",
    "zombie": "its process has ended",
    "gone": "its process is gone",
}


@dataclass(frozen=True)
class Triage:
    """The cause of a hang.

    `ranks`: the ranks that block the run; empty: no sign distinguishes any rank, or a node is silent. `nodes`: the nodes of
    these ranks and the silent nodes. `why`: the reason. `line`: one line for outcome.json. `text`: for people, with stacks.
    `still_s`: the time since the last progress of any rank, in seconds.
    """

    ranks: tuple[RankState, ...]
    nodes: tuple[str, ...]
    why: str
    line: str
    text: str
    still_s: float = 0.0


@dataclass(frozen=True)
class Straggler:
    """Slow ranks of one node.

    `what`: the slow activity, the speed probe or waiting for data. `ratio`: the median over `ranks` of the activity's duration,
    as a multiple of the median over all ranks of the run.
    """

    node: str
    what: str
    ratio: float
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.node}: {self.what} takes {self.ratio:.1f} times the median of all ranks (rank {_list(self.ranks)})"


def find_late(ranks: Sequence[RankState], silent: Sequence[str] = ()) -> Triage:
    """The cause of a hang.

    `ranks`: the states of all ranks of the run. `silent`: the nodes that send no reports any more.
    """
    ranks = [state for state in ranks if not state.has_ended]
    late, why = ([], f"no report from {', '.join(silent)}") if silent else _late(ranks)
    nodes = tuple(dict.fromkeys([*silent, *(state.node for state in late)]))
    others = [state for state in ranks if state not in late]
    line = f"hung: {_who(late)} {why}" if late else f"hung: {why}"
    lines = [line, *_waiting(others)]
    for state in late[:_NAMED]:
        lines += _stack(state)
    if not late:
        kinds = {state.frames[:1]: state for state in reversed(ranks)}
        lines += [text for state in list(kinds.values())[:_NAMED] for text in _stack(state)]
    still_s = min((state.age_s for state in ranks), default=0.0)
    return Triage(tuple(late), nodes, why, line, "\n".join(lines), still_s)


def combine(reports: Sequence[NodeReport], policy: WatchPolicy) -> Triage | None:
    """The cause of a hang of the whole run. None: the run doesn't hang.

    The verdict is the rule of launch/watch/heartbeats.py over the ranks of all nodes that still run and still report.
    """
    silence_s = max(_SILENT_S, _SILENT_INTERVALS * policy.report_interval_s)
    running = [report for report in reports if report.exit_code is None]
    silent = [report.host for report in running if report.silent_s > silence_s]
    speaking = [report for report in running if report.host not in silent]
    ranks = [replace(state, age_s=state.age_s + report.silent_s) for report in speaking for state in report.ranks]
    # The nodes of the ranks furthest behind report a hang themselves. Their reports then hold the stacks.
    if not any(report.hung for report in speaking) or not hung(ranks, policy):
        return None
    return find_late(ranks, silent)


def stragglers(reports: Sequence[NodeReport], ratio: float | None) -> list[Straggler]:
    """The slow ranks by node, the slowest node first.

    `ratio`: the multiple of the median from which a rank is slow; None: no search, and the list is empty.
    """
    ranks = [state for report in reports for state in report.ranks]
    if ratio is None:
        return []
    probes = {state: state.probe_s for state in ranks if state.probe_s}
    waits = {
        state: state.batch_wait_s
        for state in ranks
        if state.batch_wait_s is not None and state.step_time_s and state.batch_wait_s > _WAIT_SHARE * state.step_time_s
    }
    waited = [state.batch_wait_s for state in ranks if state.batch_wait_s is not None]
    found = _slow("speed probe", probes, list(probes.values()), ratio) + _slow(WAITING, waits, waited, ratio)
    return sorted(found, key=lambda straggler: -straggler.ratio)


def record_hang(folder: RunFolder, attempt: int, found: Triage) -> bool:
    """Write the event of the hang, and the outcome that the hung rank 0 can't write. Call it when all ranks are gone.

    False: nothing was written, because rank 0 recorded the attempt's outcome before the ranks hung on their way out. Raises
    OSError if the files can't be written.
    """
    outcome = folder.read_outcome()
    if outcome is not None and outcome.attempt == attempt and outcome.state != "failed":
        return False
    row = last_row(folder.metrics) or {}
    late = [{"rank": state.rank, "node": state.node, "step": state.step, "phase": state.phase} for state in found.ranks]
    append_event(
        folder, attempt, EventKind.HUNG, why=found.line, late=late, nodes=list(found.nodes), seconds=round(found.still_s, 3)
    )
    outcome = Outcome(attempt, "failed", found.line, row.get("step", 0), row.get("samples", 0))
    write_json(folder.outcome, outcome.as_dict())
    append_event(folder, attempt, EventKind.OUTCOME, state=outcome.state, why=outcome.why, step=outcome.step)
    return True


def _late(ranks: Sequence[RankState]) -> tuple[list[RankState], str]:
    """(the ranks that block the run, the reason as the rest of a sentence)."""
    for process, why in _CANT_MOVE.items():
        if found := [state for state in ranks if state.process == process]:
            return found, f"{'is' if len(found) == 1 else 'are'} late: {why} in {_place(found[0])}{_for(found)}"
    missing = [state for state in ranks if state.rank == MISSING]
    if missing:
        return missing, f"never came to life{_for(missing)}"
    first = min(state.position for state in ranks)
    behind = [state for state in ranks if state.position == first]
    # A rank without a known stack counts as busy, because the other ranks answered with theirs.
    busy = [state for state in behind if not waits_in(state)]
    if len(behind) < len(ranks):
        found = busy or behind
        return found, f"{'is' if len(found) == 1 else 'are'} behind the others: {_doing(found[0])}{_for(found)}"
    if busy and len(busy) < len(behind):
        return busy, f"{'keeps' if len(busy) == 1 else 'keep'} the others waiting: {_doing(busy[0])}{_for(busy)}"
    what = "wait in collectives" if not busy else "are out of collectives"
    return [], f"all {len(ranks)} ranks {what} in {_place(ranks[0])}{_for(ranks)}: nothing tells who is late"


def _doing(state: RankState) -> str:
    where = f", in {state.frames[0]}" if state.frames else ""
    kernel = f", in the kernel ({state.kernel or '?'})" if state.process == "uninterruptible" else ""
    return f"{_place(state)}{where}{kernel}"


def _place(state: RankState) -> str:
    return f"step {state.step}, {state.phase}" if state.step else state.phase


def _for(states: Sequence[RankState]) -> str:
    return f", for {duration(max(state.age_s for state in states))}"


def _who(late: Sequence[RankState]) -> str:
    if all(state.rank == MISSING for state in late):
        return f"{len(late)} ranks on {', '.join(dict.fromkeys(state.node for state in late))}"
    shown = ", ".join(f"{state.rank} on {state.node}" for state in late[:_NAMED])
    more = f" and {len(late) - _NAMED} more" if len(late) > _NAMED else ""
    return f"rank {shown}{more}"


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:_NAMED]) + (", …" if len(ranks) > _NAMED else "")


def _waiting(others: Sequence[RankState]) -> list[str]:
    """One line for each of the most common activities of the other ranks, the most common first."""
    kinds = Counter((_place(state), waits_in(state)) for state in others)
    first = {(_place(state), waits_in(state)): state for state in reversed(others)}
    return [
        f"  {number} other{'s' if number > 1 else ''} (rank {first[kind].rank}{', …' if number > 1 else ''}): "
        + kind[0]
        + (f", waiting in {kind[1]}" if kind[1] else "")
        for kind, number in kinds.most_common(_NAMED)
    ]


def _stack(state: RankState) -> list[str]:
    if not state.frames:
        return [f"  rank {state.rank} on {state.node} gives no stack"]
    shown = [f"    {frame}" for frame in state.frames[:_SHOWN_FRAMES]]
    return [f"  rank {state.rank} on {state.node}, innermost frame first:", *shown]


def _slow(what: str, values: dict[RankState, float], all_values: list[float], ratio: float) -> list[Straggler]:
    """The ranks whose value is at least `ratio` times the median of `all_values`, by node. Values are in seconds."""
    if not all_values:
        return []
    # The median is 0 if most ranks don't wait at all. A microsecond as the least median keeps the quotient finite.
    median = max(statistics.median(all_values), 1e-6)
    slow = {state: value / median for state, value in values.items() if value >= ratio * median}
    nodes = dict.fromkeys(state.node for state in slow)
    found = []
    for node in nodes:
        own = {state.rank: times for state, times in slow.items() if state.node == node}
        found.append(Straggler(node, what, round(statistics.median(own.values()), 2), tuple(sorted(own))))
    return found
