"""Why an attempt ended, from everything that was seen of it. In: `Seen`. Out: a cause of launch/slurm/lifecycle.py. Pure.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.watch.beats import NodeReport
from launch.watch.failures import Failure
from pretrain.run.folder import Outcome

# What the batch step was asked for, by signal or clock.
PREEMPT, TIME_LIMIT, STOP, TERMINATE = "preempted", "time_limit", "stopped", "terminated"


@dataclass(frozen=True)
class Seen:
    """`asked`: empty, or one of the words above; `hang`: the triage's line and node; `lost`: nodes that are down or fell silent.

    `outcome` is this attempt's own, None: rank 0 wrote none. `node_of` maps ranks to nodes, as far as known. `restarted`:
    Slurm has put the job back by itself; `out_of_time`: the time limit is over.
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


def fell_silent(reports: Sequence[NodeReport], first_failure_s: float | None, interval_s: float) -> list[str]:
    """Nodes that stopped reporting before anything else went wrong: without power, or cut off. Slurm notices minutes later.

    An agent's last report says that it ends. One without that was killed: after the others' failure, by srun (which waits
    for Slurm's KillWait, some reports later), or with its node, before the first rank elsewhere could notice.
    `first_failure_s`: when the first rank failed, seconds since the epoch like the reports' times.
    """
    newest_s = max((report.time for report in reports), default=0.0)
    mute = [report for report in reports if report.exit_code is None]
    if len(mute) == len(reports) == 1:
        return []

    def was_first(report: NodeReport) -> bool:
        before_failure = first_failure_s is not None and report.time < first_failure_s + interval_s + 1.0
        return before_failure or report.time < newest_s - 3 * interval_s

    return [report.host for report in mute if was_first(report)]


def judge(seen: Seen) -> tuple[str, str, str]:
    """(cause, why, blamed node or empty). What rank 0 wrote counts first, then what was asked, then what broke."""
    outcome, failures = seen.outcome, seen.failures
    if outcome is not None and outcome.state in ("finished", "diverged"):
        return outcome.state, outcome.why, ""
    if failures and failures[0].kind == "bad_input":
        return "bad_input", failures[0].text.strip(), ""
    if seen.hang is not None:
        return "hung", *seen.hang
    if seen.lost:
        return "bad_node", f"lost {', '.join(seen.lost)}", seen.lost[0]
    broke = next((failure for failure in failures if failure.kind == "exception"), None)
    saved = outcome is not None and outcome.state in ("stopped", "preempted")
    if seen.asked and (saved or broke is None):
        return _asked(seen)
    if failures:
        first = failures[0]
        return "crashed", f"rank {first.rank}: {_last_line(first.text)}", seen.node_of.get(first.rank, "")
    if outcome is not None and saved:
        # Somebody signalled the ranks past this batch step.
        return outcome.state, outcome.why, ""
    if outcome is not None:
        return "crashed", outcome.why, ""
    return "killed", f"the ranks ended without a word, srun with exit code {seen.exit_code}", ""


def _asked(seen: Seen) -> tuple[str, str, str]:
    step = f" after step {seen.outcome.step}" if seen.outcome is not None else " before the first step"
    if seen.asked == TERMINATE:
        # Slurm ends a job for one of three reasons, and says which only by what it does with the job.
        if seen.restarted:
            return "preempted", f"ended by Slurm, which starts it again{step}", ""
        if seen.out_of_time:
            return "time_limit", f"ended by the time limit{step}", ""
        return "stopped", f"scancel{step}", ""
    words = {PREEMPT: "preempted", TIME_LIMIT: "the time limit is near", STOP: "phalanx cancel"}
    return seen.asked, f"{words[seen.asked]}{step}", ""


def _last_line(text: str) -> str:
    """The message of a traceback, or a text's first line."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "no message"
    return lines[-1].strip() if lines[0].startswith("Traceback") else lines[0].strip()
