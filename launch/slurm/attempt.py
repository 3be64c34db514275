"""One attempt of a Slurm job, from srun's start to its recorded end. In: the job, nodes, signals. Out: events.

A lost attempt, whose batch step died with it, gets its end here too, from what it left in the run folder.

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

from launch.slurm import scheduler
from launch.slurm.clock import Clock
from launch.slurm.job_file import JobFile
from launch.slurm.lifecycle import Life
from launch.slurm.scheduler import SchedulerError
from launch.slurm.verdict import PREEMPT, STOP, TERMINATE, TIME_LIMIT, Seen, fell_silent, judge
from launch.watch.beats import NodeReport, ReportReader, read_reports
from launch.watch.failures import Failure, find_failures
from launch.watch.triage import Triage, combine, record_hang, stragglers
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.files import last_row, write_json
from pretrain.run.folder import Outcome, RunFolder

POLL_S = 0.5
# Between looks for stragglers.
STRAGGLER_S = 60.0

ASKS = {signal.SIGUSR1: PREEMPT, signal.SIGINT: STOP, signal.SIGTERM: TERMINATE}

T = TypeVar("T")


@dataclass(frozen=True)
class JobContext:
    """What the batch step knows of its job. `command`: srun and what it starts; `waiting`: signals as they come."""

    job_dir: Path
    spec: JobFile
    job: int
    restarts: int
    command: Sequence[str]
    environ: Mapping[str, str]
    waiting: list[int]
    clock: Clock

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.spec.run_dir))

    def say(self, text: str) -> None:
        """Into the job's output file."""
        print(f"phalanx: {text}", flush=True)

    def ask_slurm(self, ask: Callable[[], T], otherwise: T) -> T:
        """Its answer; while the controller is away `otherwise`, said aloud."""
        try:
            return ask()
        except SchedulerError as error:
            self.say(f"Slurm does not answer: {error}")
            return otherwise


@dataclass
class JobAttempt:
    """Attempt `number` of a run. `asked`: what signals or the clock asked for (launch/slurm/verdict.py), empty: nothing."""

    context: JobContext
    number: int
    asked: str = ""
    _step: subprocess.Popen[bytes] | None = None
    _told: set[tuple[str, str]] = field(default_factory=set)

    def run(self, nodes: Sequence[str]) -> None:
        """Train on `nodes` until the ranks are gone, and record how it ended."""
        context = self.context
        log_dir, before = context.folder.log_dir(self.number).absolute(), context.folder.newest_checkpoint_step()
        log_dir.mkdir(parents=True, exist_ok=True)
        numbers = {"job": context.job, "restarts": context.restarts, "step_before": before}
        self._event(EventKind.JOB_ATTEMPT, nodes=list(nodes), logs=str(log_dir), **numbers)
        filled = {"{nodes}": str(len(nodes)), "{attempt_dir}": str(self._own_dir().absolute()), "{log_dir}": str(log_dir)}
        started_s, triage, exit_code = time.time(), None, 0
        self._listen()
        if not self.asked:
            env = {**context.environ, "PHALANX_ATTEMPT": str(self.number)}
            self._step = subprocess.Popen([_fill(word, filled) for word in context.command], env=env)
            triage = self._watch(self._step)
            if not self._is_ending():
                exit_code = self._step.wait()
        self._end(nodes, before, triage, exit_code, started_s)

    def slurm_requeues(self) -> bool:
        """Has Slurm put the job back into its queue by itself?"""
        context = self.context
        if self.asked != TERMINATE:
            return False
        return context.ask_slurm(lambda: scheduler.details(context.job).restarts > context.restarts, False)

    def _watch(self, step: subprocess.Popen[bytes]) -> Triage | None:
        """Until the ranks are gone; the triage when they hung and were ended."""
        reader = ReportReader(self._own_dir())
        next_reports_s = next_stragglers_s = time.monotonic() + self.context.spec.watch.report_interval_s
        triage = None
        while step.poll() is None and not self._is_ending():
            time.sleep(POLL_S)
            self._listen()
            if not self.asked and self.context.clock.is_near():
                self._ask(TIME_LIMIT, "the time limit is near")
            now_s = time.monotonic()
            if triage is None and now_s >= next_reports_s:
                next_reports_s = now_s + self.context.spec.watch.report_interval_s
                reports = reader.read()
                triage = combine(reports, self.context.spec.watch)
                if triage is not None:
                    # Before the kill, which itself makes ranks fail: their partners die first.
                    has_failed = bool(find_failures(self.context.folder.log_dir(self.number)))
                    self._kill_step(step)
                    if has_failed:
                        # Not a hang: the others wait for a rank that is gone, until the step is ended.
                        return None
                    self.context.say(triage.text)
                elif now_s >= next_stragglers_s:
                    next_stragglers_s = now_s + STRAGGLER_S
                    self._tell_stragglers(reports)
        return triage

    def _tell_stragglers(self, reports: Sequence[NodeReport]) -> None:
        """Once a node and kind an attempt."""
        for found in stragglers(reports, self.context.spec.watch.straggler_ratio):
            if (found.node, found.what) not in self._told:
                self._told.add((found.node, found.what))
                ranks = list(found.ranks)
                self._event(EventKind.STRAGGLER, node=found.node, what=found.what, ratio=round(found.ratio, 2), ranks=ranks)
                self.context.say(str(found))

    def _kill_step(self, step: subprocess.Popen[bytes]) -> None:
        """Hung ranks don't save: SIGKILL to the step's tasks; srun's own forced end where the controller is away."""
        try:
            steps = scheduler.call(["squeue", "--noheader", "--steps", f"--jobs={self.context.job}", "--format=%i"]).split()
            for name in steps:
                if name.rpartition(".")[2].isdecimal():
                    scheduler.call(["scancel", "--signal=KILL", name])
        except SchedulerError as error:
            self.context.say(f"the step is ended through srun: {error}")
            step.terminate()

    def _end(self, nodes: Sequence[str], before: int, triage: Triage | None, exit_code: int, started_s: float) -> None:
        folder, outcome = self.context.folder, self._outcome()
        if self.asked == STOP and outcome is not None and outcome.state == "preempted":
            # The ranks can't tell who signalled them.
            outcome = replace(outcome, state="stopped", why=f"phalanx cancel: {outcome.why}")
            write_json(folder.outcome, outcome.as_dict())
        if triage is not None and not record_hang(folder, self.number, triage):
            triage = None
        reports, failures = read_reports(self._own_dir()), tuple(find_failures(folder.log_dir(self.number)))
        seen = Seen(
            self.asked,
            outcome,
            failures,
            (triage.line, triage.nodes[0] if triage.nodes else "") if triage is not None else None,
            self._lost(nodes, outcome, reports, failures),
            exit_code,
            {rank.rank: report.host for report in reports for rank in report.ranks},
            self.slurm_requeues(),
            self.asked == TERMINATE and self.context.clock.left_s() < 1.0,
        )
        self._record_end(judge(seen), before, {"srun_exit_code": exit_code, "seconds": round(time.time() - started_s, 1)})

    def post_mortem(self, life: Life) -> None:
        """The end of an attempt whose batch step died with it: its node was lost, or Slurm's patience was over."""
        failures = tuple(find_failures(self.context.folder.log_dir(self.number)))
        outcome = self._outcome()
        lost = self._lost(life.nodes, outcome, read_reports(self._own_dir()), failures)
        self._record_end(judge(Seen("", outcome, failures, None, lost)), life.step_before, {"post_mortem": True})

    def _record_end(self, verdict: tuple[str, str, str], before: int, more: Mapping[str, Any]) -> None:
        cause, why, node = verdict
        folder = self.context.folder
        last_step = (last_row(folder.metrics) or {}).get("step", 0)
        steps = {"step_before": before, "step_after": max(before, folder.newest_checkpoint_step()), "last_step": last_step}
        self._event(EventKind.JOB_ENDED, cause=cause, why=why, node=node, **steps, **more)

    def _is_ending(self) -> bool:
        """Slurm ends the job, and the ranks have saved: its KillWait may be over before srun has returned."""
        return self.asked == TERMINATE and self._outcome() is not None

    def _outcome(self) -> Outcome | None:
        """This attempt's own."""
        outcome = self.context.folder.read_outcome()
        return outcome if outcome is not None and outcome.attempt == self.number else None

    def _lost(
        self, nodes: Sequence[str], outcome: Outcome | None, reports: Sequence[NodeReport], failures: Sequence[Failure]
    ) -> Sequence[str]:
        """Of an attempt that did not end well: nodes that are down for Slurm, or that it has not noticed yet."""
        if outcome is not None and outcome.state != "failed":
            return ()
        down = self.context.ask_slurm(lambda: scheduler.lost_nodes(nodes), [])
        first_s = min((failure.time for failure in failures if failure.time), default=None)
        silent = fell_silent(reports, first_s, self.context.spec.watch.report_interval_s)
        return [*down, *(node for node in silent if node not in down)]

    def _listen(self) -> None:
        clock = self.context.clock
        while self.context.waiting:
            number = signal.Signals(self.context.waiting.pop(0))
            if number == signal.SIGUSR1:
                # Slurm warns of the time limit and of a preemption by the same signal; here the clock tells them apart.
                clock.refresh()
            self._ask(TIME_LIMIT if number == signal.SIGUSR1 and clock.is_near() else ASKS[number], number.name)

    def _ask(self, asked: str, why: str) -> None:
        """Pass a request on to the ranks: srun hands SIGUSR1 to every task without the controller's help."""
        first = not self.asked
        # A cancel by the user outweighs the signals that follow it.
        self.asked = asked if first or (asked == TERMINATE and self.asked != STOP) else self.asked
        if first:
            self._event(EventKind.JOB_SIGNAL, signal=why, asked=asked)
            self.context.say(f"{why}: the ranks finish their step and save")
        if self._step is not None and self._step.poll() is None:
            self._step.send_signal(signal.SIGUSR1)

    def _own_dir(self) -> Path:
        return self.context.folder.launch_dir(self.number)

    def _event(self, kind: EventKind, **fields: Any) -> None:
        append_event(self.context.folder, self.number, kind, **fields)


def _fill(word: str, filled: Mapping[str, str]) -> str:
    for name, value in filled.items():
        word = word.replace(name, value)
    return word
