"""The batch step of a Slurm job: python -m launch.job JOB_DIR -- srun …

Starts the ranks, passes signals on, watches for hangs, and at the end decides: over, requeue, or left to Slurm. All that
it knows of earlier attempts stands in events.jsonl, so that it may be killed at any moment and started on other nodes.
Standard library and this project's light modules only.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.events import append_event
from configs.files import last_row, write_json
from configs.run_folder import SILENCE_S, RunFolder
from launch import scheduler
from launch.clock import Clock
from launch.failures import Failure, find_failures
from launch.job_file import SCRIPT_NAME, JobFile
from launch.lifecycle import ENDED, OVER, Decision, Life, decide, read_life
from launch.local import claim_attempt
from launch.scheduler import SchedulerError
from launch.triage import Triage, combine, record_hang, stragglers
from launch.verdict import PREEMPT, STOP, TERMINATE, TIME_LIMIT, Seen, fell_silent, judge
from launch.watch import NodeReport, ReportReader, read_reports

POLL_S = 0.5
# Between looks for stragglers.
STRAGGLER_S = 60.0
# A controller that is restarted comes back within minutes; longer waits would hold the nodes for nothing.
REQUEUE_PATIENCE_S = 600.0

ASKS = {signal.SIGUSR1: PREEMPT, signal.SIGINT: STOP, signal.SIGTERM: TERMINATE}


class Supervisor:
    """One run of the batch step."""

    def __init__(self, job_dir: Path, command: Sequence[str], environ: Mapping[str, str], waiting: list[int]) -> None:
        """`waiting` receives the signals that come (see `listen`). Raises FileNotFoundError: JOB_DIR is gone."""
        self.job_dir = job_dir
        self.spec = JobFile.read(job_dir)
        self.folder = RunFolder(Path(self.spec.run_dir))
        self.command = command
        self.environ = environ
        self.job = int(environ["SLURM_JOB_ID"])
        self.restarts = int(environ.get("SLURM_RESTART_COUNT", 0))
        self.clock = Clock(self.folder, self.job, self.spec.stop_before_s, environ)
        self.asked = ""
        self.attempt = 0
        self._waiting = waiting
        self._step: subprocess.Popen[bytes] | None = None
        self._told: set[tuple[str, str]] = set()

    def run(self) -> int:
        """The exit code of the batch step."""
        life = read_life(self.folder)
        if self.job not in life.jobs or life.phase == OVER:
            self._event("job_submitted", jobs=[self.job])
        done = self.folder.done_step()
        if done is not None and done >= self.spec.stop_step:
            return self._act(Decision("over", f"finished at step {done}", "finished"))
        life = read_life(self.folder)
        if life.lost:
            self._post_mortem(life)
            life = read_life(self.folder)
        if life.phase == ENDED:
            # The attempt before had no time to decide, or left it to Slurm.
            decision = decide(life, self.spec.policy, slurm_requeues=True)
            if decision.action != "wait":
                return self._act(decision)
            self._event("job_requeued", why=decision.why, exclude=[])
        nodes = scheduler.expand(self.environ["SLURM_JOB_NODELIST"])
        size = max((size for size in self.spec.sizes if size <= len(nodes)), default=None)
        if size is None:
            why = f"Slurm gave {len(nodes)} nodes; layout and batch need one of {', '.join(map(str, self.spec.sizes))}"
            return self._act(Decision("over", why, "bad_input"))
        try:
            # The lock of a rank 0 that died with its node falls silent before it may be taken.
            self.attempt = claim_attempt(self.folder, patience_s=2 * SILENCE_S)
        except ConfigError as error:
            return self._act(Decision("over", str(error), "gave_up"))
        self._attempt(nodes, size)
        life = read_life(self.folder)
        return self._act(decide(life, self._policy(life), self._slurm_requeues()))

    # One attempt.

    def _attempt(self, nodes: Sequence[str], size: int) -> None:
        """Run the claimed attempt on the first `size` of `nodes`, to its recorded end."""
        log_dir, before = self.folder.log_dir(self.attempt).absolute(), self.folder.newest_checkpoint_step()
        log_dir.mkdir(parents=True, exist_ok=True)
        self._event(
            "job_attempt", job=self.job, restarts=self.restarts, nodes=nodes[:size], step_before=before, logs=str(log_dir)
        )
        filled = {"{nodes}": str(size), "{attempt_dir}": str(self._attempt_dir().absolute()), "{log_dir}": str(log_dir)}
        started_s, triage, exit_code = time.time(), None, 0
        self._listen()
        if not self.asked:
            env = {**self.environ, "PHALANX_ATTEMPT": str(self.attempt)}
            self._step = subprocess.Popen([_fill(word, filled) for word in self.command], env=env)
            triage = self._watch(self._step)
            exit_code = self._step.wait()
            self._step = None
        self._end(nodes, before, triage, exit_code, started_s)

    def _watch(self, step: subprocess.Popen[bytes]) -> Triage | None:
        """Until the ranks are gone; the triage when they hung and were ended."""
        reader = ReportReader(self._attempt_dir())
        next_reports_s = next_stragglers_s = time.monotonic() + self.spec.watch.report_interval_s
        triage = None
        while step.poll() is None:
            time.sleep(POLL_S)
            self._listen()
            if not self.asked and self.clock.is_near():
                self._ask(TIME_LIMIT, "the time limit is near")
            now_s = time.monotonic()
            if triage is None and now_s >= next_reports_s:
                next_reports_s = now_s + self.spec.watch.report_interval_s
                reports = reader.read()
                triage = combine(reports, self.spec.watch)
                if triage is not None:
                    self._kill_step(step)
                    if find_failures(self.folder.log_dir(self.attempt)):
                        # Not a hang: a rank has failed, and its partners wait for it until the step is ended.
                        return None
                    self._say(triage.text)
                elif now_s >= next_stragglers_s:
                    next_stragglers_s = now_s + STRAGGLER_S
                    self._tell_stragglers(reports)
        return triage

    def _tell_stragglers(self, reports: Sequence[NodeReport]) -> None:
        """Once a node and kind an attempt."""
        for found in stragglers(reports, self.spec.watch.straggler_ratio):
            if (found.node, found.what) not in self._told:
                self._told.add((found.node, found.what))
                ranks = list(found.ranks)
                self._event("straggler", node=found.node, what=found.what, ratio=round(found.ratio, 2), ranks=ranks)
                self._say(str(found))

    def _kill_step(self, step: subprocess.Popen[bytes]) -> None:
        """Hung ranks don't save: SIGKILL to the step's tasks; srun's own forced end where the controller is away."""
        try:
            steps = scheduler.call(["squeue", "--noheader", "--steps", f"--jobs={self.job}", "--format=%i"]).split()
            for name in steps:
                if name.rpartition(".")[2].isdecimal():
                    scheduler.call(["scancel", "--signal=KILL", name])
        except SchedulerError as error:
            self._say(f"the step is ended through srun: {error}")
            step.terminate()

    def _end(self, nodes: Sequence[str], before: int, triage: Triage | None, exit_code: int, started_s: float) -> None:
        outcome = self.folder.read_outcome()
        outcome = outcome if outcome is not None and outcome.attempt == self.attempt else None
        if self.asked == STOP and outcome is not None and outcome.state == "preempted":
            # The ranks can't tell who signalled them.
            outcome = replace(outcome, state="stopped", why=f"phalanx cancel: {outcome.why}")
            write_json(self.folder.outcome, outcome.as_dict())
        if triage is not None:
            record_hang(self.folder, self.attempt, triage)
        reports = read_reports(self._attempt_dir())
        failures = tuple(find_failures(self.folder.log_dir(self.attempt)))
        seen = Seen(
            self.asked,
            outcome,
            failures,
            (triage.line, triage.nodes[0] if triage.nodes else "") if triage is not None else None,
            self._lost(nodes, reports, failures) if outcome is None or outcome.state == "failed" else (),
            exit_code,
            {rank.rank: report.host for report in reports for rank in report.ranks},
            self._slurm_requeues(),
            self._out_of_time(),
        )
        self._event_end(judge(seen), before, {"srun_exit_code": exit_code, "seconds": round(time.time() - started_s, 1)})

    def _post_mortem(self, life: Life) -> None:
        """The end of an attempt whose batch step died with it: its node was lost, or Slurm's patience was over."""
        self.attempt = life.lost
        outcome = self.folder.read_outcome()
        outcome = outcome if outcome is not None and outcome.attempt == life.lost else None
        failures = tuple(find_failures(self.folder.log_dir(life.lost)))
        unwell = outcome is None or outcome.state == "failed"
        lost = self._lost(life.nodes, read_reports(self._attempt_dir()), failures) if unwell else ()
        self._event_end(judge(Seen("", outcome, failures, None, lost)), life.step_before, {"post_mortem": True})

    def _event_end(self, verdict: tuple[str, str, str], before: int, more: Mapping[str, Any]) -> None:
        cause, why, node = verdict
        after = max(before, self.folder.newest_checkpoint_step())
        last_step = (last_row(self.folder.metrics) or {}).get("step", 0)
        steps = {"step_before": before, "step_after": after, "last_step": last_step}
        self._event("job_ended", cause=cause, why=why, node=node, **steps, **more)

    # Signals and clock.

    def _listen(self) -> None:
        while self._waiting:
            number = signal.Signals(self._waiting.pop(0))
            if number == signal.SIGUSR1:
                # Slurm warns of the time limit and of a preemption by the same signal; here the clock tells them apart.
                self.clock.refresh()
            self._ask(TIME_LIMIT if number == signal.SIGUSR1 and self.clock.is_near() else ASKS[number], number.name)

    def _ask(self, asked: str, why: str) -> None:
        """Pass a request on to the ranks: srun hands SIGUSR1 to every task without the controller's help."""
        first = not self.asked
        # A cancel by the user outweighs the signals that follow it.
        self.asked = asked if first or (asked == TERMINATE and self.asked != STOP) else self.asked
        if first:
            self._event("job_signal", signal=why, asked=asked)
            self._say(f"{why}: the ranks finish their step and save")
        if self._step is not None and self._step.poll() is None:
            self._step.send_signal(signal.SIGUSR1)

    # After the end.

    def _policy(self, life: Life) -> Any:
        """Without requeue a chain goes on as long as it has further jobs."""
        return replace(self.spec.policy, requeue=self.spec.policy.requeue or self._chain_left(life))

    def _chain_left(self, life: Life) -> bool:
        return self.job in life.jobs and self.job != life.jobs[-1]

    def _act(self, decision: Decision) -> int:
        self._say(f"{decision.state or decision.action}: {decision.why}")
        life = read_life(self.folder)
        if decision.action == "over":
            return self._over(decision.state, decision.why, decision.exit_code, life)
        self._event("job_requeued", why=decision.why, exclude=list(decision.exclude))
        if decision.action == "wait":
            return decision.exit_code
        excluded = tuple(dict.fromkeys([*life.excluded, *decision.exclude]))
        try:
            if self._chain_left(life):
                for job in life.jobs[life.jobs.index(self.job) + 1 :] if excluded else ():
                    scheduler.call(["scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join(excluded)}"])
            else:
                scheduler.requeue(self.job, excluded, REQUEUE_PATIENCE_S)
        except SchedulerError as error:
            return self._submit_anew(decision, life, str(error))
        return decision.exit_code

    def _submit_anew(self, decision: Decision, life: Life, refusal: str) -> int:
        """A site that forbids requeue may still take the script again."""
        try:
            job = scheduler.submit(self.job_dir / SCRIPT_NAME, f"afterany:{self.job}")
        except SchedulerError as error:
            why = f"{decision.why}; scontrol requeue: {refusal}; sbatch: {error}; phalanx resume {self.folder.path} goes on"
            return self._over("preempted", why, decision.exit_code, life)
        self._event("job_resubmitted", jobs=[job], why=refusal)
        return decision.exit_code

    def _over(self, state: str, why: str, exit_code: int, life: Life) -> int:
        self._event("job_over", state=state, exit_code=exit_code, why=why)
        rest = life.jobs[life.jobs.index(self.job) + 1 :] if self.job in life.jobs else ()
        if rest:
            self._try(lambda: scheduler.cancel(rest), None)
        return exit_code

    # What is known.

    def _attempt_dir(self) -> Path:
        return self.folder.launch_dir(self.attempt)

    def _lost(self, nodes: Sequence[str], reports: Sequence[NodeReport], failures: Sequence[Failure]) -> Sequence[str]:
        """Down, as Slurm sees it; it may not have noticed yet."""
        down = self._try(lambda: scheduler.lost_nodes(nodes), [])
        first_s = min((failure.time for failure in failures if failure.time), default=None)
        silent = fell_silent(reports, first_s, self.spec.watch.report_interval_s)
        return [*down, *(node for node in silent if node not in down)]

    def _slurm_requeues(self) -> bool:
        if self.asked != TERMINATE:
            return False
        return self._try(lambda: scheduler.details(self.job).restarts > self.restarts, False)

    def _out_of_time(self) -> bool:
        return self.asked == TERMINATE and self.clock.left_s() < 1.0

    def _try(self, ask: Callable[[], Any], otherwise: Any) -> Any:
        """What Slurm says, or `otherwise`, said aloud, while its controller is away."""
        try:
            return ask()
        except SchedulerError as error:
            self._say(f"Slurm does not answer: {error}")
            return otherwise

    def _event(self, kind: str, **fields: Any) -> None:
        append_event(self.folder, self.attempt, kind, **fields)

    def _say(self, text: str) -> None:
        print(f"phalanx: {text}", flush=True)


def listen() -> list[int]:
    """Take the signals before anything else is done, for Slurm doesn't wait; the list grows as they come."""
    waiting: list[int] = []
    for number in ASKS:
        signal.signal(number, lambda received, _: waiting.append(received))
    return waiting


def _fill(word: str, filled: Mapping[str, str]) -> str:
    for name, value in filled.items():
        word = word.replace(name, value)
    return word


def main(argv: Sequence[str]) -> int:
    """JOB_DIR -- COMMAND: as the batch script writes it."""
    waiting = listen()
    parser = argparse.ArgumentParser(
        prog="python -m launch.job",
        usage="%(prog)s JOB_DIR -- COMMAND …",
        description="The batch step of a Slurm job. COMMAND is srun and what it starts; in it {nodes}, {attempt_dir} and "
        "{log_dir} are filled in.",
    )
    parser.add_argument("job_dir", type=Path, metavar="JOB_DIR", help="launch/job_NNNN of the run folder")
    # argparse would take the command's own -- away as well.
    cut = list(argv).index("--") if "--" in argv else len(argv)
    found, command = parser.parse_args(list(argv[:cut])), argv[cut + 1 :]
    if not command:
        parser.error("a command must follow --")
    return Supervisor(found.job_dir, command, os.environ, waiting).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
