"""One attempt of a Slurm job, from the start of srun to the recorded end. In: the job, nodes, signals. Out: events.

The end of an attempt whose batch step was killed is recorded here too, from the files in the run folder.

Torch-free.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from launch.disk_wait import wait_for_disk
from launch.slurm import node_states, scheduler
from launch.slurm.clock import TimeLimitClock
from launch.slurm.host_guard import HostGuard
from launch.slurm.job_file import JobFile
from launch.slurm.job_step import kill_steps, step_words
from launch.slurm.lifecycle import RunLifecycle
from launch.slurm.rendezvous import Rendezvous, RendezvousError, choose_host, choose_port, resolves
from launch.slurm.scheduler import SchedulerError
from launch.slurm.standby_step import StandbyStep
from launch.slurm.verdict import PREEMPT, STOP, TERMINATE, TIME_LIMIT, AttemptEvidence, fell_silent, is_abandoned, judge
from launch.watch.failures import Failure, find_failures
from launch.watch.heartbeats import MISSING, NodeReport, ReportReader, read_reports
from launch.watch.triage import Triage, combine, record_hang, stragglers
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.files import last_row, write_atomically, write_json
from pretrain.run.folder import Outcome, RunFolder

POLL_S = 0.5
# The names of an attempt's nodes, one a line, in the attempt's folder.
NODE_FILE = "nodes.txt"
# Interval between searches for stragglers.
STRAGGLER_S = 60.0

SIGNAL_REQUESTS = {signal.SIGUSR1: PREEMPT, signal.SIGINT: STOP, signal.SIGTERM: TERMINATE}

T = TypeVar("T")


@dataclass(frozen=True)
class JobContext:
    """What the batch step knows about its job. `command` is srun with its arguments. `waiting` receives the incoming signals."""

    job_dir: Path
    spec: JobFile
    job: int
    restarts: int
    command: Sequence[str]
    environ: Mapping[str, str]
    waiting: list[int]
    clock: TimeLimitClock
    host_guard: HostGuard
    standby: StandbyStep

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.spec.run_dir))

    def log(self, text: str) -> None:
        """Write a line into the job's output file."""
        print(f"phalanx: {text}", flush=True)

    def record(self, attempt: int, kind: EventKind, **fields: Any) -> None:
        """Append an event on which decisions are built. Waits for the disk. Raises OSError."""
        wait_for_disk(lambda: append_event(self.folder, attempt, kind, **fields), f"the event {kind}", self.log)

    def is_requeued(self) -> bool:
        """Has Slurm requeued the job by itself?"""
        return self.query_slurm(lambda: scheduler.details(self.job).restarts > self.restarts, False)

    def is_out_of_time(self) -> bool:
        """Does Slurm end the job because of its time limit?"""
        return self.clock.left_s() < 1.0

    def is_ended_by_user(self) -> bool:
        """Has a signal that no attempt has taken asked for the end of the run?"""
        asked = {SIGNAL_REQUESTS[signal.Signals(number)] for number in self.waiting}
        return STOP in asked or (TERMINATE in asked and not self.is_out_of_time() and not self.is_requeued())

    def query_slurm(self, ask: Callable[[], T], otherwise: T) -> T:
        """The answer of `ask`. While the controller does not answer: `otherwise`, and a line in the job's output."""
        try:
            return ask()
        except SchedulerError as error:
            self.log(f"Slurm does not answer: {error}")
            return otherwise


@dataclass
class JobAttempt:
    """Attempt `number` of a run.

    `again`: it is not the first one in this allocation. `asked` is the stop that a signal or the time limit requested (a word of
    launch/slurm/verdict.py), or empty. `lost` are the nodes that were down or silent at its end.
    """

    context: JobContext
    number: int
    again: bool = False
    asked: str = ""
    lost: list[str] = field(default_factory=list)
    _step: subprocess.Popen[bytes] | None = None
    _rendezvous: Rendezvous | None = None
    _reported: set[tuple[str, str]] = field(default_factory=set)

    def run(self, nodes: Sequence[str]) -> None:
        """Train on `nodes` until all ranks have ended, then record how the attempt ended."""
        context = self.context
        log_dir, before = context.folder.log_dir(self.number).absolute(), context.folder.newest_checkpoint_step()
        log_dir.mkdir(parents=True, exist_ok=True)
        numbers = {"job": context.job, "restarts": context.restarts, "step_before": before}
        self._event(EventKind.JOB_ATTEMPT, nodes=list(nodes), logs=str(log_dir), **numbers)
        started_s, triage, exit_code = time.time(), None, 0
        self._take_signals()
        if not self.asked:
            try:
                self._rendezvous = self._choose_rendezvous(nodes[0])
            except RendezvousError as error:
                self._record_end(("crashed", str(error), ""), before, {"seconds": 0.0})
                return
            self._step = self._start(nodes, self._rendezvous, log_dir)
            triage = self._watch(self._step)
            if not self._is_ending():
                exit_code = self._step.wait()
        self._end(nodes, before, triage, exit_code, started_s)

    def _start(self, nodes: Sequence[str], rendezvous: Rendezvous, log_dir: Path) -> subprocess.Popen[bytes]:
        context, own_dir = self.context, self._own_dir().absolute()
        write_atomically(own_dir / NODE_FILE, "\n".join(nodes) + "\n")
        filled = {
            "{nodes}": str(len(nodes)),
            "{node_file}": str(own_dir / NODE_FILE),
            "{attempt}": str(self.number),
            "{attempt_dir}": str(own_dir),
            "{log_dir}": str(log_dir),
            "{host}": rendezvous.host,
            "{port}": str(rendezvous.port),
        }
        context.log(f"attempt {self.number} on {', '.join(nodes)}; its agents meet at {rendezvous}")
        own = {"PHALANX_ATTEMPT": str(self.number)}
        if (step := context.standby.begin(nodes, filled, own)) is not None:
            context.log("its nodes have imported the libraries")
            return step
        return subprocess.Popen(step_words(context.command, filled, self.again), env={**context.environ, **own})

    def slurm_requeues(self) -> bool:
        """Has Slurm requeued the job by itself, as far as this attempt can know?"""
        return self.asked == TERMINATE and self.context.is_requeued()

    def _choose_rendezvous(self, node: str) -> Rendezvous:
        """Raises RendezvousError. Slurm is asked for an address only where the node's name has none."""
        context = self.context
        addresses = {} if resolves(node) else context.query_slurm(lambda: node_states.node_addresses([node]), {})
        port = choose_port(context.job, self.number, context.spec.master_port)
        return Rendezvous(choose_host(node, addresses.get(node, "")), port)

    def _watch(self, step: subprocess.Popen[bytes]) -> Triage | None:
        """Wait until the ranks have ended. Returns the triage if they hung and were killed."""
        reader = ReportReader(self._own_dir())
        next_reports_s = next_stragglers_s = time.monotonic() + self.context.spec.watch.report_interval_s
        triage = None
        while step.poll() is None and not self._is_ending():
            time.sleep(POLL_S)
            self._take_signals()
            if not self.asked and self.context.clock.is_near():
                self._forward()
                self._note_stop(TIME_LIMIT, "the time limit is near")
            now_s = time.monotonic()
            if triage is None and now_s >= next_reports_s:
                next_reports_s = now_s + self.context.spec.watch.report_interval_s
                self.context.host_guard.keep()
                if not self.asked:
                    self.context.standby.look()
                reports = reader.read()
                if is_abandoned(reports, self.context.spec.watch):
                    # srun waits for the lost nodes, for as long as Slurm takes to notice.
                    self._kill_step(step)
                    step.kill()
                    return None
                triage = combine(reports, self.context.spec.watch)
                if triage is not None:
                    triage = self._with_rendezvous(triage)
                    # Looked up before the kill, because the kill makes further ranks fail.
                    has_failed = bool(find_failures(self.context.folder.log_dir(self.number)))
                    self._kill_step(step)
                    if has_failed:
                        # Not a hang: the other ranks waited for a rank that has failed.
                        return None
                    self.context.log(triage.text)
                elif now_s >= next_stragglers_s:
                    next_stragglers_s = now_s + STRAGGLER_S
                    self._report_stragglers(reports)
        return triage

    def _with_rendezvous(self, triage: Triage) -> Triage:
        """Ranks that never started may have waited for their meeting point: the triage names it."""
        if not any(state.rank == MISSING for state in triage.ranks):
            return triage
        place = f"; all agents meet at {self._rendezvous}: its name must resolve and its port be reachable on every node"
        return replace(triage, line=triage.line + place, text=triage.text + place)

    def _report_stragglers(self, reports: Sequence[NodeReport]) -> None:
        """Report each kind of straggling once for each node in an attempt."""
        for found in stragglers(reports, self.context.spec.watch.straggler_ratio):
            if (found.node, found.what) not in self._reported:
                self._reported.add((found.node, found.what))
                ranks = list(found.ranks)
                self._note(EventKind.STRAGGLER, node=found.node, what=found.what, ratio=round(found.ratio, 2), ranks=ranks)
                self.context.log(str(found))

    def _kill_step(self, step: subprocess.Popen[bytes]) -> None:
        """Send SIGKILL to the tasks of the step, because hung ranks cannot save. Without a controller, terminate srun instead.

        The standby's step is killed too.
        """
        self.context.standby.drop()
        try:
            kill_steps(self.context.job)
        except SchedulerError as error:
            self.context.log(f"the step is ended through srun: {error}")
            step.terminate()

    def _end(self, nodes: Sequence[str], before: int, triage: Triage | None, exit_code: int, started_s: float) -> None:
        self._take_signals()
        folder, outcome = self.context.folder, self._outcome()
        if self.asked == STOP and outcome is not None and outcome.state == "preempted":
            # The ranks cannot know who sent the signal.
            outcome = replace(outcome, state="stopped", why=f"phalanx cancel: {outcome.why}")
            write_json(folder.outcome, outcome.as_dict())
        if triage is not None and not record_hang(folder, self.number, triage):
            triage = None
        reports, failures = read_reports(self._own_dir()), tuple(find_failures(folder.log_dir(self.number)))
        down, silent = self._missing(nodes, outcome, reports, failures)
        self.lost = [*down, *silent]
        agentless = ""
        # Several silent nodes are a network's failure. One may have lost its agent alone.
        if not down and len(silent) == 1 and self.context.query_slurm(lambda: node_states.answers(silent[0]), False):
            silent, agentless, self.lost = [], silent[0], down
        seen = AttemptEvidence(
            self.asked,
            outcome,
            failures,
            _hang_evidence(triage),
            [*down, *silent],
            exit_code,
            {rank.rank: report.host for report in reports for rank in report.ranks},
            self.slurm_requeues(),
            self.asked == TERMINATE and self.context.is_out_of_time(),
            [report.host for report in reports if report.exit_code is None],
            agentless,
        )
        self._record_end(judge(seen), before, {"srun_exit_code": exit_code, "seconds": round(time.time() - started_s, 1)})

    def post_mortem(self, life: RunLifecycle) -> None:
        """Record the end of an attempt whose batch step was killed, with its node or by Slurm."""
        failures = tuple(find_failures(self.context.folder.log_dir(self.number)))
        outcome = self._outcome()
        down, silent = self._missing(life.nodes, outcome, read_reports(self._own_dir()), failures)
        seen = AttemptEvidence("", outcome, failures, None, [*down, *silent])
        self._record_end(judge(seen), life.step_before, {"post_mortem": True})

    def _record_end(self, verdict: tuple[str, str, str], before: int, more: Mapping[str, Any]) -> None:
        cause, why, node = verdict
        folder = self.context.folder
        last_step = (last_row(folder.metrics) or {}).get("step", 0)
        steps = {"step_before": before, "step_after": max(before, folder.newest_checkpoint_step()), "last_step": last_step}
        self._event(EventKind.JOB_ENDED, cause=cause, why=why, node=node, **steps, **more)

    def _is_ending(self) -> bool:
        """Slurm ends the job and the ranks have saved. Waiting for srun could then take longer than KillWait allows."""
        return self.asked == TERMINATE and self._outcome() is not None

    def _outcome(self) -> Outcome | None:
        """The outcome of this attempt, or None."""
        outcome = self.context.folder.read_outcome()
        return outcome if outcome is not None and outcome.attempt == self.number else None

    def _missing(
        self, nodes: Sequence[str], outcome: Outcome | None, reports: Sequence[NodeReport], failures: Sequence[Failure]
    ) -> tuple[list[str], list[str]]:
        """(nodes that are down for Slurm, other nodes that fell silent before the first failure). Empty after a good end."""
        if outcome is not None and outcome.state != "failed":
            return [], []
        down = self.context.query_slurm(lambda: node_states.lost_nodes(nodes), [])
        first_s = min((failure.time for failure in failures if failure.time), default=None)
        silent = fell_silent(reports, first_s, self.context.spec.watch.report_interval_s)
        return down, [node for node in silent if node not in down]

    def _take_signals(self) -> None:
        clock = self.context.clock
        while self.context.waiting:
            number = signal.Signals(self.context.waiting.pop(0))
            # First of all, because the controller may take seconds to answer.
            self._forward()
            asked = SIGNAL_REQUESTS[number]
            if number == signal.SIGUSR1:
                # Slurm announces the time limit and a preemption by the same signal. The clock tells them apart.
                clock.refresh()
                asked = TIME_LIMIT if clock.is_announced() else asked
            self._note_stop(asked, number.name)

    def _note_stop(self, asked: str, why: str) -> None:
        """Keep the reason of a stop. Only the first one is recorded as an event."""
        first = not self.asked
        # A cancel by the user outweighs the signals that follow it.
        self.asked = asked if first or (asked == TERMINATE and self.asked != STOP) else self.asked
        if first:
            self._note(EventKind.JOB_SIGNAL, signal=why, asked=asked)
            self.context.log(f"{why}: the ranks finish their step and save")

    def _forward(self) -> None:
        """Ask the ranks to save and end. srun hands SIGUSR1 to every task without the controller."""
        if self._step is not None and self._step.poll() is None:
            self._step.send_signal(signal.SIGUSR1)

    def _own_dir(self) -> Path:
        return self.context.folder.launch_dir(self.number)

    def _event(self, kind: EventKind, **fields: Any) -> None:
        self.context.record(self.number, kind, **fields)

    def _note(self, kind: EventKind, **fields: Any) -> None:
        """Record an event on which no decision is built. The ranks train on, or save, whether the disk takes it or not."""
        try:
            append_event(self.context.folder, self.number, kind, **fields)
        except OSError as error:
            self.context.log(f"the event {kind} is not recorded: {error}")


def _hang_evidence(triage: Triage | None) -> tuple[str, str] | None:
    """(line, node) of the triage; the node is empty if no rank stands out."""
    if triage is None:
        return None
    return triage.line, triage.nodes[0] if triage.nodes else ""
