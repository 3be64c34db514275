"""The life of a Slurm run as a state machine. In: events.jsonl's rows. Out: where the run stands, and what to do next.

    new ──job_submitted──► queued ──job_attempt──► running ──job_ended──► ended ──job_requeued──► queued
                             │                                              └──────job_over──────► over
                             └──────────────────────job_over (cancelled while it waited)─────────► over

No clock, no Slurm. The rows are the record: who starts later, anywhere, replays them and decides alike.

Torch-free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pretrain.run.events import EventKind
from pretrain.run.files import iterate_lines
from pretrain.run.folder import EXIT_BAD_INPUT, EXIT_BROKE, EXIT_CODE, RunFolder

NEW, QUEUED, RUNNING, ENDED, OVER = "new", "queued", "running", "ended", "over"

# What each row does to the phase, from every phase: a killed supervisor may have left rows out.
TRANSITIONS = {
    EventKind.JOB_SUBMITTED: QUEUED,
    EventKind.JOB_ATTEMPT: RUNNING,
    EventKind.JOB_ENDED: ENDED,
    EventKind.JOB_REQUEUED: QUEUED,
    EventKind.JOB_OVER: OVER,
}

# Why an attempt ended → the state in which the run is over; None: the run goes on in another attempt.
CAUSES: dict[str, str | None] = {
    "finished": "finished",
    "stopped": "stopped",
    "bad_input": "bad_input",
    "diverged": "diverged",
    "preempted": None,
    "time_limit": None,
    "bad_node": None,
    "killed": None,
    "crashed": None,
    "hung": None,
}
# Without progress, again and again, no restart will help: the run's own fault, or too little time for one checkpoint.
SUSPECT = frozenset({"crashed", "hung", "killed", "time_limit"})
# The node may be at fault.
BLAMES_NODE = frozenset({"bad_node", "crashed", "hung", "killed"})
EXIT_OF = {**EXIT_CODE, "bad_input": EXIT_BAD_INPUT, "gave_up": EXIT_BROKE}


@dataclass(frozen=True)
class AttemptEnd:
    """`step_before`, `step_after`: the newest complete checkpoint. `node`: on which it began to go wrong, empty: none."""

    attempt: int
    cause: str
    why: str = ""
    step_before: int = 0
    step_after: int = 0
    node: str = ""

    def __post_init__(self) -> None:
        assert self.cause in CAUSES, f"{self.cause} is not one of {sorted(CAUSES)}"


@dataclass(frozen=True)
class RequeuePolicy:
    """How often a run is started again; see launch.slurm of the config."""

    requeue: bool = True
    max_attempts: int = 50
    max_without_progress: int = 2
    exclude_after_failures: int = 2


@dataclass(frozen=True)
class NextAction:
    """`action`: over, requeue, or wait (Slurm starts it again by itself). `state`: of a run that is over. `exclude`: nodes."""

    action: str
    why: str
    state: str = ""
    exclude: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT_OF[self.state] if self.action == "over" else EXIT_CODE["preempted"]


@dataclass(frozen=True)
class RunLifecycle:
    """The run since its last submission. `lost`: an attempt that began and whose end nobody wrote; 0: none."""

    phase: str = NEW
    jobs: tuple[int, ...] = ()
    attempt: int = 0
    step_before: int = 0
    nodes: tuple[str, ...] = ()
    ends: tuple[AttemptEnd, ...] = ()
    excluded: tuple[str, ...] = ()
    state: str = ""
    why: str = ""
    begun: int = field(default=0)

    @property
    def lost(self) -> int:
        return self.attempt if self.phase == RUNNING else 0


def replay(rows: Iterable[Mapping[str, Any]]) -> RunLifecycle:
    """Fold the rows, oldest first; rows of other kinds pass."""
    life = RunLifecycle()
    for row in rows:
        life = advance(life, row)
    return life


def read_lifecycle(folder: RunFolder) -> RunLifecycle:
    """The life in a run folder's events; a new one without any."""
    events = folder.events
    return replay(row for _, row in iterate_lines(events) if row is not None) if events.exists() else RunLifecycle()


def advance(life: RunLifecycle, row: Mapping[str, Any]) -> RunLifecycle:
    """One row. A submission begins a new life: its bounds count from there."""
    kind = row.get("kind", "")
    if kind not in TRANSITIONS:
        return life
    if kind == EventKind.JOB_SUBMITTED and life.phase != OVER and set(row["jobs"]) & set(life.jobs):
        # The job began before its submitter had written this row.
        return replace(life, jobs=tuple(dict.fromkeys([*row["jobs"], *life.jobs])))
    life = replace(life, phase=TRANSITIONS[kind], why=str(row.get("why", "")))
    if kind == EventKind.JOB_SUBMITTED:
        return RunLifecycle(QUEUED, jobs=tuple(row["jobs"]))
    if kind == EventKind.JOB_ATTEMPT:
        nodes = tuple(row.get("nodes", ()))
        return replace(life, attempt=row["attempt"], step_before=row["step_before"], nodes=nodes, begun=life.begun + 1)
    if kind == EventKind.JOB_ENDED:
        end = AttemptEnd(row["attempt"], row["cause"], row["why"], row["step_before"], row["step_after"], row.get("node") or "")
        return replace(life, ends=(*life.ends, end))
    if kind == EventKind.JOB_REQUEUED:
        return replace(life, excluded=tuple(dict.fromkeys([*life.excluded, *row.get("exclude", ())])))
    return replace(life, state=row["state"])


def decide(life: RunLifecycle, policy: RequeuePolicy, slurm_requeues: bool = False) -> NextAction:
    """What follows the last end of `life`. `slurm_requeues`: Slurm has put the job back into its queue by itself."""
    assert life.ends, "a decision follows an end"
    last = life.ends[-1]
    state = CAUSES[last.cause]
    if state is not None:
        return NextAction("over", last.why, state)
    if len(life.ends) >= policy.max_attempts:
        return NextAction("over", f"{len(life.ends)} attempts, launch.slurm.max_attempts = {policy.max_attempts}", "gave_up")
    stuck = without_progress(life.ends)
    if stuck >= policy.max_without_progress:
        why = (
            f"{stuck} attempts in a row ended {last.cause} without a new checkpoint (at step {last.step_after}), "
            f"launch.slurm.max_without_progress = {policy.max_without_progress}: {last.why}"
        )
        return NextAction("over", why, "gave_up")
    exclude = tuple(node for node in failed_nodes(life.ends, policy) if node not in life.excluded)
    why = last.why if last.why.startswith(last.cause) else f"{last.cause}: {last.why}"
    if slurm_requeues and not exclude:
        return NextAction("wait", why)
    if not policy.requeue and not slurm_requeues:
        return NextAction("over", f"{why}; launch.slurm.requeue is false", "preempted")
    return NextAction("requeue", why, exclude=exclude)


def without_progress(ends: Sequence[AttemptEnd]) -> int:
    """Suspect ends in a row without a new checkpoint. Preemptions and lost nodes in between neither count nor excuse."""
    count = 0
    for end in reversed(ends):
        if end.step_after > end.step_before:
            break
        count += end.cause in SUSPECT
    return count


def failed_nodes(ends: Sequence[AttemptEnd], policy: RequeuePolicy) -> list[str]:
    """Nodes blamed often enough to be kept off, by name."""
    blamed = Counter(end.node for end in ends if end.node and end.cause in BLAMES_NODE)
    limit = policy.exclude_after_failures
    return sorted(node for node, times in blamed.items() if limit and times >= limit)
