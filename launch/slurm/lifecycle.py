"""The lifecycle of a Slurm run as a state machine. In: events.jsonl's rows. Out: where the run stands, and what to do next.

    new ──job_submitted──► queued ──job_attempt──► running ──job_ended──► ended ──job_requeued──► queued
                             │                        ▲                       ├──job_restarted──► restarting
                             │                        └──────job_attempt──────┼────────────────────┘
                             │                                                └─────job_over────► over
                             └──────────────────────job_over (cancelled while it waited)─────────► over

A restart in place starts the next attempt in the same allocation. It follows a crash, a hang or a lost node. A preemption, the
time limit, and an allocation that has lost too many nodes go through the queue.

This module reads no clock and asks no Slurm command. Any batch step that replays the same rows makes the same decision,
whenever and wherever it starts.

Torch-free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.folder import EXIT_BAD_INPUT, EXIT_BROKE, EXIT_CODE, RunFolder

NEW, QUEUED, RUNNING, ENDED, RESTARTING, OVER = "new", "queued", "running", "ended", "restarting", "over"

# Kind of row → the phase after it, from every phase. A killed batch step may have left rows out.
TRANSITIONS = {
    EventKind.JOB_SUBMITTED: QUEUED,
    EventKind.JOB_ATTEMPT: RUNNING,
    EventKind.JOB_ENDED: ENDED,
    EventKind.JOB_REQUEUED: QUEUED,
    EventKind.JOB_RESTARTED: RESTARTING,
    EventKind.JOB_OVER: OVER,
}

# Cause of an attempt's end → the final state of the run. None: the run goes on in another attempt.
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
# If these causes repeat without progress, no restart will help. The run itself is at fault, or the time limit is too short
# for one checkpoint.
SUSPECT = frozenset({"crashed", "hung", "killed", "time_limit"})
# After these causes, the node may be at fault.
BLAMES_NODE = frozenset({"bad_node", "crashed", "hung", "killed"})
# What a restart in the same allocation can heal.
HEALED_IN_PLACE = frozenset({"crashed", "hung", "killed", "bad_node"})
EXIT_OF = {**EXIT_CODE, "bad_input": EXIT_BAD_INPUT, "gave_up": EXIT_BROKE}


@dataclass(frozen=True)
class AttemptEnd:
    """The recorded end of an attempt.

    `step_before` and `step_after` are the steps of the newest complete checkpoint before and after the attempt. `node` is
    the node on which the failure began, or empty.
    """

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
    """How often a run is started again. The keys of launch.slurm in the config have the same names."""

    requeue: bool = True
    max_attempts: int = 50
    max_without_progress: int = 2
    exclude_after_failures: int = 2


@dataclass(frozen=True)
class Allocation:
    """What a restart in place has to work with.

    `nodes` are the nodes of the job that still work, in Slurm's order. `sizes` are the numbers of nodes that the run may use,
    ascending.
    """

    nodes: tuple[str, ...]
    sizes: tuple[int, ...]

    def choose(self, unused: Sequence[str] = ()) -> tuple[str, ...]:
        """The nodes of the next attempt, without those of `unused`. Empty: too few are left."""
        left = [node for node in self.nodes if node not in unused]
        size = max((size for size in self.sizes if size <= len(left)), default=0)
        return tuple(left[:size])


@dataclass(frozen=True)
class NextAction:
    """What follows the end of an attempt.

    `action` is over, restart, requeue or wait. With wait, Slurm starts the job again by itself. `state` is the final state of
    a run that is over. `exclude` are the nodes to keep the job off. `nodes` are those of a restart in place.
    """

    action: str
    why: str
    state: str = ""
    exclude: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT_OF[self.state] if self.action == "over" else EXIT_CODE["preempted"]


@dataclass(frozen=True)
class RunLifecycle:
    """The run since its last submission. `lost` is the number of an attempt whose end was not recorded, or 0."""

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
    """The lifecycle after all `rows`, oldest first. Rows of other kinds change nothing."""
    life = RunLifecycle()
    for row in rows:
        life = advance(life, row)
    return life


def read_lifecycle(folder: RunFolder) -> RunLifecycle:
    """The lifecycle recorded in the events of a run folder. A folder without events has a new lifecycle."""
    return replay(read_events(folder))


def advance(life: RunLifecycle, row: Mapping[str, Any]) -> RunLifecycle:
    """The lifecycle after one more row. A submission begins a new lifecycle, so attempts are counted from there.

    An attempt outside of the run's jobs, such as one by the local launcher, ends the lifecycle: Slurm does not know of it.
    """
    kind = row.get("kind", "")
    if kind == EventKind.ATTEMPT and life.jobs and row.get("slurm_job") not in [str(job) for job in life.jobs]:
        return RunLifecycle()
    if kind not in TRANSITIONS or row.get("cause", "killed") not in CAUSES:
        # A cause that this version does not know was written by another one: the next batch step finds the end anew.
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
    return replace(life, state=row["state"]) if kind == EventKind.JOB_OVER else life


def decide(
    life: RunLifecycle, policy: RequeuePolicy, slurm_requeues: bool = False, allocation: Allocation | None = None
) -> NextAction:
    """Decide what follows the last end of `life`.

    `slurm_requeues`: Slurm has requeued the job by itself. `allocation`: what a restart in place would use; None: there is no
    allocation, or the job is asked to leave it.
    """
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
    failed = failed_nodes(life.ends, policy)
    exclude = tuple(node for node in failed if node not in life.excluded)
    why = last.why if last.why.startswith(last.cause) else f"{last.cause}: {last.why}"
    can_heal = last.cause in HEALED_IN_PLACE and not slurm_requeues
    if allocation is not None and can_heal and (nodes := allocation.choose(failed)):
        return NextAction("restart", why, nodes=nodes)
    if slurm_requeues and not exclude:
        return NextAction("wait", why)
    if not policy.requeue and not slurm_requeues:
        return NextAction("over", f"{why}; launch.slurm.requeue is false", "preempted")
    return NextAction("requeue", why, exclude=exclude)


def without_progress(ends: Sequence[AttemptEnd]) -> int:
    """The number of suspect ends since the last new checkpoint. Preemptions and lost nodes in between change nothing."""
    count = 0
    for end in reversed(ends):
        if end.step_after > end.step_before:
            break
        count += end.cause in SUSPECT
    return count


def failed_nodes(ends: Sequence[AttemptEnd], policy: RequeuePolicy) -> list[str]:
    """The nodes, sorted by name, that were blamed often enough for the job to be kept off them."""
    blamed = Counter(end.node for end in ends if end.node and end.cause in BLAMES_NODE)
    limit = policy.exclude_after_failures
    return sorted(node for node, times in blamed.items() if limit and times >= limit)
