"""Why an attempt ended. In: `AttemptEvidence`. Out: a cause of launch/slurm/lifecycle.py. No side effects.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.watch.failures import NO_RANK, Failure
from launch.watch.heartbeats import NodeReport, WatchPolicy
from pretrain.run.folder import Outcome

# The first line of a ConfigError.
_PROBLEMS = re.compile(r"\d+ problems?:")
# The stop that a signal or the time limit requested.
PREEMPT, TIME_LIMIT, STOP, TERMINATE = "preempted", "time_limit", "stopped", "terminated"


@dataclass(frozen=True)
class AttemptEvidence:
    """Everything that is known about the end of an attempt.

    `asked` is empty or one of the words above. `outcome` is what rank 0 of this attempt wrote, or None. `hang` is the line
    and the node of the triage. `lost` are the nodes that are down or fell silent. `node_of` maps ranks to nodes, as far as
    known. `restarted`: Slurm has requeued the job by itself. `out_of_time`: the time limit has passed. `mute` are the nodes
    whose agent wrote no last report. `agentless` is the only node that fell silent while Slurm still reaches it, or empty.
    """

    asked: str = ""
    outcome: Outcome | None = None
    failures: Sequence[Failure] = ()
    hang: tuple[str, str] | None = None
    lost: Sequence[str] = ()
    exit_code: int = 0
    node_of: Mapping[int, str] = field(default_factory=dict)
    restarted: bool = False
    out_of_time: bool = False
    mute: Sequence[str] = ()
    agentless: str = ""


def fell_silent(reports: Sequence[NodeReport], first_failure_s: float | None, interval_s: float) -> list[str]:
    """Nodes that stopped reporting before anything else failed: without power or cut off. Slurm notices them minutes later.

    The last report of an agent says that the agent ends. An agent without such a report was killed. srun kills agents only
    after a failure elsewhere plus KillWait, some reports later. A lost node goes silent before the first rank elsewhere can
    fail. `first_failure_s` is the time of the first rank's failure, in seconds since the epoch like the reports' times.
    """
    newest_s = max((report.time for report in reports), default=0.0)
    mute = [report for report in reports if report.exit_code is None]
    if len(mute) == len(reports) == 1:
        return []

    def was_first(report: NodeReport) -> bool:
        before_failure = first_failure_s is not None and report.time < first_failure_s + interval_s + 1.0
        return before_failure or report.time < newest_s - 3 * interval_s

    return [report.host for report in mute if was_first(report)]


def is_abandoned(reports: Sequence[NodeReport], policy: WatchPolicy) -> bool:
    """Have the ranks of all nodes ended that still report, and has another node stopped reporting? srun would go on waiting."""
    silent_s = 3 * policy.report_interval_s + 2.0
    ended = [report for report in reports if report.exit_code is not None]
    silent = [report for report in reports if report.exit_code is None and report.silent_s > silent_s]
    return bool(ended and silent) and len(ended) + len(silent) == len(reports)


def judge(seen: AttemptEvidence) -> tuple[str, str, str]:
    """(cause, reason, blamed node or empty). A user who ends the run ends it, also where it fails on its way out."""
    cause, why, node = _judge(seen)
    if cause in ("crashed", "hung", "killed") and _user_ends(seen):
        return "stopped", f"{_asked(seen)[1]}; {why}", ""
    return cause, why, node


def _user_ends(seen: AttemptEvidence) -> bool:
    """Slurm itself ends a job for other reasons, and a lost node may be one."""
    return seen.asked == STOP or (seen.asked == TERMINATE and not seen.restarted and not seen.out_of_time)


def _judge(seen: AttemptEvidence) -> tuple[str, str, str]:
    """Rank 0's outcome counts first, then a hang, lost nodes, a request, a failure."""
    outcome, failures = seen.outcome, seen.failures
    if outcome is not None and outcome.state in ("finished", "diverged"):
        return outcome.state, outcome.why, ""
    if failures and failures[0].kind == "bad_input":
        return "bad_input", failures[0].text.strip(), ""
    if seen.hang is not None:
        return "hung", *seen.hang
    if seen.lost:
        return "bad_node", f"lost {', '.join(seen.lost)}", seen.lost[0]
    if seen.agentless:
        # The ranks of other nodes only report that they lost this node's ranks.
        node = seen.agentless
        return "killed", f"the agent of {node} was killed or cannot write its reports; Slurm still reaches {node}", node
    broke = next((failure for failure in failures if failure.kind == "exception"), None)
    saved = outcome is not None and outcome.state in ("stopped", "preempted")
    if seen.asked and (saved or broke is None):
        return _asked(seen)
    if failures:
        first = failures[0]
        if first.rank == NO_RANK:
            return "crashed", f"{first.node}: {_last_line(first.text)}", first.node
        return "crashed", f"rank {first.rank}: {_last_line(first.text)}", seen.node_of.get(first.rank, "")
    if outcome is not None and saved:
        # The ranks were signalled directly, not through this batch step.
        return outcome.state, outcome.why, ""
    if outcome is not None:
        return "crashed", outcome.why, ""
    mute = f"the agent of {', '.join(seen.mute)} was killed: " if len(seen.mute) == 1 else ""
    node = seen.mute[0] if len(seen.mute) == 1 else ""
    return "killed", f"{mute}the ranks ended without a message, srun with exit code {seen.exit_code}", node


def _asked(seen: AttemptEvidence) -> tuple[str, str, str]:
    step = f" after step {seen.outcome.step}" if seen.outcome is not None else " before the first step"
    if seen.asked == TERMINATE:
        # Slurm ends a job for one of three reasons. Only its treatment of the job tells which one it was.
        if seen.restarted:
            return "preempted", f"ended by Slurm, which starts it again{step}", ""
        if seen.out_of_time:
            return "time_limit", f"ended by the time limit{step}", ""
        return "stopped", f"scancel{step}", ""
    words = {PREEMPT: "preempted", TIME_LIMIT: "the time limit is near", STOP: "phalanx cancel"}
    return seen.asked, f"{words[seen.asked]}{step}", ""


def _last_line(text: str) -> str:
    """The message of a traceback, the whole text of a ConfigError, or the first line of any other text."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "no message"
    if _PROBLEMS.fullmatch(lines[0]):
        return "; ".join(line.strip() for line in lines[1:])
    return lines[-1].strip() if lines[0].startswith("Traceback") else lines[0].strip()
