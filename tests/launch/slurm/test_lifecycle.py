"""The state machine of a Slurm run: every end has one answer, every bound holds, and the record alone decides."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.slurm.lifecycle import (
    CAUSES,
    ENDED,
    HEALED_IN_PLACE,
    NEW,
    OVER,
    QUEUED,
    RESTARTING,
    RUNNING,
    SUSPECT,
    TRANSITIONS,
    Allocation,
    AttemptEnd,
    RequeuePolicy,
    RunLifecycle,
    decide,
    failed_nodes,
    replay,
    without_progress,
)
from pretrain.run.folder import EXIT_CODE

POLICY = RequeuePolicy(max_attempts=6, max_without_progress=2, exclude_after_failures=2)


def rows(*ends: tuple[str, int, int, str]) -> list[dict[str, Any]]:
    """Rows of a submission whose attempts ended so: (cause, step before, step after, node)."""
    found: list[dict[str, Any]] = [{"kind": "job_submitted", "jobs": [7]}]
    for number, (cause, before, after, node) in enumerate(ends, 1):
        found += [
            {"kind": "job_attempt", "attempt": number, "nodes": ["node1", "node2"], "step_before": before},
            {"kind": "saved", "step": after},
            {
                "kind": "job_ended", "attempt": number, "cause": cause, "why": "so", "step_before": before, "step_after": after,
                "node": node,
            },
        ]  # fmt: skip
        if number < len(ends):
            found.append({"kind": "job_requeued", "why": "so", "exclude": []})
    return found


def life(*ends: tuple[str, int, int, str]) -> RunLifecycle:
    return replay(rows(*ends))


def test_the_phases_follow_the_rows() -> None:
    assert replay([]).phase == NEW
    phases = [replay(rows(("crashed", 0, 5, ""), ("finished", 5, 9, ""))[:count]).phase for count in range(1, 9)]
    assert phases == [QUEUED, RUNNING, RUNNING, ENDED, QUEUED, RUNNING, RUNNING, ENDED]
    over = replay([*rows(("finished", 0, 9, "")), {"kind": "job_over", "state": "finished", "why": "done"}])
    assert (over.phase, over.state, over.why) == (OVER, "finished", "done")
    assert set(TRANSITIONS.values()) == {QUEUED, RUNNING, ENDED, RESTARTING, OVER}


def test_an_attempt_without_an_end_is_lost_and_found() -> None:
    lost = replay(rows(("crashed", 0, 5, ""))[:2])
    assert lost.lost == 1 and lost.step_before == 0 and lost.nodes == ("node1", "node2")
    assert life(("crashed", 0, 5, "")).lost == 0


def test_a_job_may_begin_before_its_submission_is_written() -> None:
    early = rows(("preempted", 0, 3, ""))
    late = replay([*early[:2], {"kind": "job_submitted", "jobs": [7, 8]}, *early[2:]])
    assert late.jobs == (7, 8) and late.phase == ENDED and len(late.ends) == 1
    again = replay([*early, {"kind": "job_over", "state": "gave_up", "why": "so"}, {"kind": "job_submitted", "jobs": [7]}])
    assert again.ends == () and again.phase == QUEUED, "the same job, put back by hand after it was over"


@pytest.mark.parametrize("cause", sorted(cause for cause, state in CAUSES.items() if state))
def test_which_ends_are_final(cause: str) -> None:
    decision = decide(life((cause, 0, 3, "")), POLICY, slurm_requeues=True)
    assert decision.action == "over" and decision.state == CAUSES[cause]
    assert decision.exit_code == {**EXIT_CODE, "bad_input": 2}[decision.state]


@pytest.mark.parametrize("cause", sorted(cause for cause, state in CAUSES.items() if not state))
def test_other_ends_are_followed_by_an_attempt(cause: str) -> None:
    assert decide(life((cause, 0, 3, "")), POLICY).action == "requeue"
    assert decide(life((cause, 0, 3, "")), POLICY, slurm_requeues=True).action == "wait"
    without = decide(life((cause, 0, 3, "")), RequeuePolicy(requeue=False))
    assert (without.action, without.state, without.exit_code) == ("over", "preempted", 75)


def test_a_crash_loop_ends() -> None:
    once = life(("crashed", 0, 0, "node1"))
    assert decide(once, POLICY).action == "requeue"
    twice = decide(life(("crashed", 4, 4, "node1"), ("hung", 4, 4, "node2")), POLICY)
    assert twice.action == "over" and twice.state == "gave_up" and twice.exit_code == 1
    assert "launch.slurm.max_without_progress = 2" in twice.why and "step 4" in twice.why
    progress = decide(life(("crashed", 0, 0, ""), ("crashed", 0, 4, ""), ("crashed", 4, 4, "")), POLICY)
    assert progress.action == "requeue", "a new checkpoint in between starts the count anew"


def test_preemptions_without_progress_are_no_crash_loop() -> None:
    ends = [("preempted", 0, 0, "")] * 4
    assert decide(life(*ends), POLICY).action == "requeue"
    mixed = [("crashed", 0, 0, ""), ("preempted", 0, 0, ""), ("bad_node", 0, 0, "node3"), ("crashed", 0, 0, "")]
    assert decide(life(*mixed), POLICY).state == "gave_up", "nor do they excuse one"


def test_a_node_that_failed_twice_is_excluded_once() -> None:
    ends = [("crashed", 0, 2, "node2"), ("hung", 2, 4, "node2")]
    decision = decide(life(*ends), POLICY, slurm_requeues=True)
    assert decision.action == "requeue" and decision.exclude == ("node2",), "Slurm's own requeue would not exclude it"
    excluded = [*rows(*ends), {"kind": "job_requeued", "why": "so", "exclude": ["node2"]}]
    later = replay([*excluded, *rows(("preempted", 4, 6, ""))[1:]])
    assert later.excluded == ("node2",) and decide(later, POLICY).exclude == ()
    assert decide(life(*ends), RequeuePolicy(exclude_after_failures=0)).exclude == ()


def test_attempts_are_bounded_and_a_new_submission_counts_anew() -> None:
    ends = [("preempted", step, step + 1, "") for step in range(6)]
    assert decide(life(*ends), POLICY).state == "gave_up"
    over = {"kind": "job_over", "state": "gave_up", "why": "so"}
    again = replay([*rows(*ends), over, *rows(("preempted", 6, 7, ""))])
    assert len(again.ends) == 1 and decide(again, POLICY).action == "requeue"


FOUR = Allocation(("node1", "node2", "node3", "node4"), (1, 2, 3))


@pytest.mark.parametrize("cause", sorted(CAUSES))
def test_what_the_allocation_can_heal_starts_again_in_it(cause: str) -> None:
    decision = decide(life((cause, 0, 3, "node2")), POLICY, allocation=FOUR)
    assert (decision.action == "restart") == (cause in HEALED_IN_PLACE)
    if decision.action == "restart":
        assert decision.nodes == ("node1", "node2", "node3") and not decision.exclude, "one failure does not condemn a node"
        assert decide(life((cause, 0, 3, "node2")), POLICY, True, FOUR).action == "wait"
        alone = RequeuePolicy(requeue=False)
        assert decide(life((cause, 0, 3, "node2")), alone, allocation=FOUR).action == "restart", "it is no requeue"


def test_a_node_that_failed_twice_is_unused_and_is_excluded_by_the_next_requeue() -> None:
    ends = [("crashed", 0, 2, "node2"), ("hung", 2, 4, "node2")]
    restarted = [row if row["kind"] != "job_requeued" else {"kind": "job_restarted", "why": "so"} for row in rows(*ends)]
    assert replay(restarted[:5]).phase == RESTARTING and replay(restarted[:5]).jobs == (7,)
    again = replay(restarted)
    assert decide(again, POLICY, allocation=FOUR).nodes == ("node1", "node3", "node4")
    few = decide(again, POLICY, allocation=Allocation(("node1", "node2"), (2,)))
    assert (few.action, few.exclude) == ("requeue", ("node2",))


def test_restarts_in_place_are_bounded_like_all_others() -> None:
    assert decide(life(("crashed", 4, 4, ""), ("crashed", 4, 4, "")), POLICY, allocation=FOUR).state == "gave_up"
    ends = [("bad_node", step, step + 1, "") for step in range(6)]
    assert decide(life(*ends), POLICY, allocation=FOUR).state == "gave_up"


def test_the_largest_size_that_fits_is_used() -> None:
    assert Allocation(("a", "b", "c"), (2, 4)).choose() == ("a", "b")
    assert Allocation(("a", "b", "c"), (2, 4)).choose(["a"]) == ("b", "c")
    assert Allocation(("a", "b", "c"), (4,)).choose() == () == Allocation((), (1,)).choose()


@given(st.lists(st.tuples(st.sampled_from(sorted(CAUSES)), st.integers(0, 1), st.sampled_from(["", "a", "b"])), min_size=1))
@settings(deadline=None)
def test_every_history_is_decided_and_no_bound_is_passed(history: list[tuple[str, int, str]]) -> None:
    step, ends = 0, []
    for number, (cause, gain, node) in enumerate(history, 1):
        ends.append(AttemptEnd(number, cause, "so", step, step + gain, node))
        step += gain
    decision = decide(RunLifecycle(ENDED, ends=tuple(ends)), POLICY)
    if decision.action != "over":
        assert len(ends) < POLICY.max_attempts and without_progress(ends) < POLICY.max_without_progress
        assert CAUSES[ends[-1].cause] is None
    assert set(decision.exclude) <= set(failed_nodes(ends, POLICY))
    assert without_progress(ends) <= sum(end.cause in SUSPECT for end in ends)
