"""What an attempt's end means, for each way in which one ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.errors import ConfigError, Problem
from configs.schema import Config
from launch.slurm.verdict import PREEMPT, STOP, TERMINATE, TIME_LIMIT, AttemptEvidence, fell_silent, is_abandoned, judge
from launch.watch.failures import NO_RANK, Failure
from launch.watch.heartbeats import NodeReport, make_watch_policy
from pretrain.run.folder import Outcome

CRASH = Failure(3, 1.0, "exception", "Traceback (most recent call last):\n  File x\nRuntimeError: ECC error")
KILLED = Failure(1, 0.0, "killed", "killed by signal 9 (SIGKILL)")
NO_ROOM = Failure(NO_RANK, 2.0, "exception", str(ConfigError(Problem("TMPDIR", "/x", "needs room", "free some"))), "node4")
NODES = {1: "node1", 3: "node2"}


def outcome(state: str) -> Outcome:
    return Outcome(1, state, f"it {state}", 8, 64)


@pytest.mark.parametrize(
    ("seen", "cause", "words", "node"),
    [
        (AttemptEvidence(outcome=outcome("finished")), "finished", "it finished", ""),
        (AttemptEvidence(asked=TERMINATE, outcome=outcome("finished")), "finished", "it finished", ""),
        (AttemptEvidence(outcome=outcome("diverged")), "diverged", "it diverged", ""),
        (AttemptEvidence(failures=(Failure(0, 1.0, "bad_input", "1 problem\n  data.train"),)), "bad_input", "data.train", ""),
        (AttemptEvidence(mute=("node2",), exit_code=137), "killed", "the agent of node2 was killed", "node2"),
        (AttemptEvidence(mute=("node1", "node2"), exit_code=137), "killed", "without a message, srun with exit code 137", ""),
        (
            AttemptEvidence(failures=(CRASH,), node_of=NODES, agentless="node1"),
            "killed",
            "the agent of node1 was killed",
            "node1",
        ),
        (AttemptEvidence(failures=(NO_ROOM,)), "crashed", "node4: TMPDIR = '/x'; rule: needs room; fix:  free some", "node4"),
        (AttemptEvidence(asked=PREEMPT, outcome=outcome("preempted")), "preempted", "after step 8", ""),
        (AttemptEvidence(asked=PREEMPT), "preempted", "before the first step", ""),
        (AttemptEvidence(asked=TIME_LIMIT, outcome=outcome("preempted")), "time_limit", "time limit is near", ""),
        (AttemptEvidence(asked=STOP, outcome=outcome("stopped")), "stopped", "phalanx cancel", ""),
        (AttemptEvidence(asked=TERMINATE, outcome=outcome("preempted")), "stopped", "scancel", ""),
        (AttemptEvidence(asked=TERMINATE, outcome=outcome("preempted"), restarted=True), "preempted", "starts it again", ""),
        (AttemptEvidence(asked=TERMINATE, out_of_time=True), "time_limit", "time limit", ""),
        (AttemptEvidence(asked=TERMINATE, lost=("node2",), restarted=True), "bad_node", "node2", "node2"),
        (
            AttemptEvidence(failures=(CRASH, KILLED), exit_code=1, node_of=NODES),
            "crashed",
            "rank 3: RuntimeError: ECC error",
            "node2",
        ),
        (AttemptEvidence(failures=(KILLED,), exit_code=1, node_of=NODES), "crashed", "rank 1: killed by signal 9", "node1"),
        (AttemptEvidence(failures=(CRASH,), outcome=outcome("preempted"), node_of=NODES), "crashed", "ECC", "node2"),
        (AttemptEvidence(asked=PREEMPT, failures=(CRASH,), node_of=NODES), "crashed", "ECC", "node2"),
        (AttemptEvidence(asked=PREEMPT, failures=(KILLED,)), "preempted", "before the first step", ""),
        (
            AttemptEvidence(asked=STOP, failures=(CRASH,), node_of=NODES),
            "stopped",
            "cancel before the first step; rank 3: RuntimeError",
            "",
        ),
        (
            AttemptEvidence(asked=TERMINATE, hang=("rank 1 is late", "node1")),
            "stopped",
            "scancel before the first step; rank 1 is late",
            "",
        ),
        (AttemptEvidence(asked=TERMINATE, failures=(CRASH,), out_of_time=True), "crashed", "ECC", ""),
        (AttemptEvidence(asked=TERMINATE, failures=(CRASH,), restarted=True), "crashed", "ECC", ""),
        (AttemptEvidence(hang=("rank 1 is late", "node1"), failures=(KILLED,)), "hung", "rank 1 is late", "node1"),
        (AttemptEvidence(outcome=outcome("failed")), "crashed", "it failed", ""),
        (AttemptEvidence(outcome=outcome("preempted")), "preempted", "it preempted", ""),
        (AttemptEvidence(exit_code=137), "killed", "exit code 137", ""),
    ],
)
def test_each_end_has_its_cause(seen: AttemptEvidence, cause: str, words: str, node: str) -> None:
    found = judge(seen)
    assert found[0] == cause and words in found[1] and found[2] == node


def report(host: str, time: float, exit_code: int | None) -> NodeReport:
    return NodeReport(host=host, time=time, pid=1, exit_code=exit_code, ranks=(), hung=False, failures=())


def test_a_node_without_power_is_told_from_one_that_was_ended() -> None:
    """Reports every 2 s; the first rank elsewhere fails at 100."""
    lost = [report("a", 105, 1), report("b", 99.2, None)]
    assert fell_silent(lost, 100.0, 2.0) == ["b"]
    ended_by_srun = [report("a", 108, None), report("b", 101, 1)]
    assert fell_silent(ended_by_srun, 100.0, 2.0) == []
    all_ended_together = [report("a", 101, None), report("b", 102, None)]
    assert fell_silent(all_ended_together, None, 2.0) == []
    noticed_late = [report("a", 140, None), report("b", 99, None), report("c", 139, None)]
    assert fell_silent(noticed_late, None, 2.0) == ["b"], "Slurm ended the others when it noticed"
    assert fell_silent([report("a", 99, None)], 100.0, 2.0) == [], "the only node is this one"


def test_srun_is_not_waited_for_when_only_lost_nodes_are_left() -> None:
    policy = make_watch_policy(Config())
    ended, failed, alive = report("a", 105, 0), report("b", 105, 1), report("c", 105, None)
    silent = replace(report("d", 90, None), silent_s=3 * policy.report_interval_s + 3.0)
    assert is_abandoned([failed, silent], policy) and is_abandoned([ended, failed, silent], policy)
    assert not is_abandoned([failed, alive, silent], policy), "its ranks may still save"
    assert not is_abandoned([failed, ended], policy) and not is_abandoned([silent], policy) and not is_abandoned([], policy)
