"""Runs a plan on this machine and leaves no process behind. In: a `LaunchPlan`. Out: one log per rank, a `LocalRunResult`.

torchrun, the agent, runs in its own session. A Ctrl-C at the terminal therefore reaches only this launcher, and the launcher
forwards the signal to the ranks. torchrun would forward a signal twice and kill the ranks 30 s later, even during a save.

Torch-free.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from configs.errors import ConfigError
from launch.launch_lock import launch_lock
from launch.local.next_agent import NextAgent
from launch.local.parent_guard import LINGER_S, MARK_NAME, clear_up
from launch.local.scratch import scratch_folder
from launch.local.signals import SignalForwarder
from launch.local.view import RunView
from launch.plan import LaunchPlan, torchrun_line
from launch.watch.failures import AGENT_LOG, Failure, describe, find_failures
from launch.watch.hang import HangWatch
from launch.watch.triage import Triage, find_late, record_hang
from pretrain.run.beat import BEAT_DIR
from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.files import storage_error, write_atomically, write_json
from pretrain.run.folder import EXIT_BAD_INPUT, EXIT_BROKE, EXIT_CODE, RunFolder, check_run_folder
from pretrain.run.lock import held_problem, live_holder
from pretrain.run.process import node_name, process_start_ticks

POLL_S = 0.1
# The time between two looks at the ranks' heartbeats.
LOOK_S = 1.0
STACKS = "stacks.txt"
# The processes of a killed attempt need some time to end.
PATIENCE_S = 5.0
# With less free space than this, logs and the outcome may be missing.
FULL_BYTES = 1 << 20


@dataclass(frozen=True)
class LocalRunResult:
    """How an attempt on this machine ended.

    `state`: the state of the outcome, or bad_input, or hung, or died (no outcome was written). `exit_code`: the launcher's.
    `failures`: the failed ranks, the most likely cause first. `triage`: the cause of a hang; None: the run did not hang.
    `why`: the outcome's reason; empty: the state is not from the outcome. `asked`: the state that a signal asked for; empty: no
    signal came.
    """

    attempt: int
    state: str
    exit_code: int
    log_dir: Path
    failures: tuple[Failure, ...]
    triage: Triage | None = None
    why: str = ""
    asked: str = ""


def run_local(
    plan: LaunchPlan, environ: Mapping[str, str], out: TextIO, total_steps: int, next_agent: NextAgent, signals: SignalForwarder
) -> LocalRunResult:
    """Start the ranks and return when all of them are gone. After a signal, no ranks start.

    `environ`: the ranks' environment, to which the plan adds its variables. `out`: the stream that shows the run while it
    trains (launch/local/view.py). `total_steps`: the length of the progress bar. `next_agent`: has the standby for this attempt,
    if any, and starts that of the next one. `signals`: has its handlers installed. Raises ConfigError if run.dir holds foreign
    files, is in use, or can't be written.
    """
    if problems := check_run_folder(plan.folder):
        raise ConfigError(problems)
    with launch_lock(plan.folder, PATIENCE_S):
        return _run_alone(plan, environ, out, total_steps, next_agent, signals)


def _run_alone(
    plan: LaunchPlan, environ: Mapping[str, str], out: TextIO, total_steps: int, next_agent: NextAgent, signals: SignalForwarder
) -> LocalRunResult:
    attempt = claim_attempt(plan.folder)
    log_dir = plan.folder.log_dir(attempt).resolve()
    signals.mark = mark = next_agent.choose_mark()
    _write_launch_files(plan, attempt, log_dir, mark)
    ours = {MARK_NAME: mark, "PHALANX_ATTEMPT": str(attempt), "PHALANX_LOG_DIR": str(log_dir)}
    signals.deliver()
    if signals.asked:
        return replace(_conclude(plan.folder, attempt, log_dir, signals.asked), asked=signals.asked)
    guard = _start_guard(mark)
    try:
        with scratch_folder("beats", in_memory=True) as beats:
            agent = _start_agent(plan, {**environ, **dict(plan.env), **ours, BEAT_DIR: str(beats)}, log_dir, next_agent)
            signals.agent = agent.pid
            view = RunView(log_dir, plan.folder.metrics, out, total_steps)
            watch = HangWatch(beats, plan.watch, node_name(environ))
            triage = _stay(agent, view, signals, watch, next_agent, log_dir)
            # SIGKILL, because an agent that ends by itself lets hung ranks live for another 30 s.
            agent.kill()
            code = agent.wait()
            # If the agent itself was killed, the ranks are killed without a delay.
            clear_up(mark, 0.0 if triage is None and code < 0 else LINGER_S)
        view.finish()
    finally:
        signals.agent = 0
        _dismiss(guard)
    # What came while the last processes ended.
    signals.deliver()
    hang = _conclude_hang(plan.folder, attempt, log_dir, triage) if triage is not None else None
    return replace(hang or _conclude(plan.folder, attempt, log_dir, signals.asked), asked=signals.asked)


def _stay(
    agent: subprocess.Popen[bytes],
    view: RunView,
    signals: SignalForwarder,
    watch: HangWatch,
    next_agent: NextAgent,
    log_dir: Path,
) -> Triage | None:
    """Wait for the agent to end, then return None. If the ranks hang, write their stacks and return the cause.

    All ranks are still alive after a hang.
    """
    look_s = time.monotonic() + LOOK_S
    while agent.poll() is None:
        time.sleep(POLL_S)
        view.pump()
        signals.deliver()
        if time.monotonic() >= look_s:
            look_s = time.monotonic() + LOOK_S
            watch.look()
            next_agent.look()
            if watch.hung:
                try:
                    (log_dir / STACKS).write_text(watch.stacks)
                except OSError as error:
                    # The ranks must be ended all the same.
                    print(f"phalanx: no {STACKS}: {error}", file=sys.stderr)
                return find_late(watch.states)
    return None


def claim_attempt(folder: RunFolder, patience_s: float = PATIENCE_S) -> int:
    """Take the next attempt number by making its launch folder, and return the number.

    `patience_s`: how long to wait for the holder of the folder to end, in seconds. Raises ConfigError if run.dir holds
    foreign files, is still held after that time, or can't be written.
    """
    if problems := check_run_folder(folder):
        raise ConfigError(problems)
    deadline = time.monotonic() + patience_s
    while (holder := live_holder(folder)) is not None:
        if time.monotonic() > deadline:
            raise ConfigError(held_problem(folder, holder))
        time.sleep(POLL_S)
    try:
        while True:
            attempt = max([0, *folder.claimed_attempts()]) + 1
            try:
                folder.launch_dir(attempt).mkdir(parents=True)
            except FileExistsError:
                # Another launcher took this number first. The run's lock decides later which of the two trains.
                continue
            return attempt
    except OSError as error:
        raise storage_error("run.dir", folder.path, error) from error


def report(result: LocalRunResult, folder: RunFolder) -> str:
    """The launcher's message at the end of the attempt. Empty: the run finished, or ended on request."""
    if result.state in ("finished", "stopped", "preempted"):
        return ""
    if result.triage is not None:
        return f"{result.triage.text}\nall ranks were ended; every thread's stack: {result.log_dir / STACKS}"
    if result.state == "bad_input":
        return result.failures[0].text
    if result.state == "diverged":
        # All ranks end with exit code 3, which torchrun reports as a failure.
        return f"diverged: {result.why}\nlogs: {result.log_dir}"
    if result.state == "failed" and all(failure.kind == "exit" for failure in result.failures):
        # The ranks agreed on the failure and ended in good order.
        return f"failed: {result.why}\nlogs: {result.log_dir}"
    return describe(list(result.failures), result.log_dir) + _disk_note(folder)


def _disk_note(folder: RunFolder) -> str:
    """A note that the run's file system is full, because no process could then record a reason. Empty: it has free space."""
    free = shutil.disk_usage(folder.path).free
    return (
        f"\nthe file system of {folder.path} is full ({free / 1e6:.1f} MB free): free some space, then start it again"
        if free < FULL_BYTES
        else ""
    )


def _write_launch_files(plan: LaunchPlan, attempt: int, log_dir: Path, mark: str) -> None:
    """Make the attempt's folders and write command.sh and launcher.json into them.

    command.sh holds the command line as a user could type it. launcher.json names the process that `cancel` must signal.
    Raises ConfigError if the files can't be written.
    """
    folder = plan.folder.launch_dir(attempt)
    line = f"cd {shlex.quote(os.getcwd())}\n{torchrun_line(plan)}\n"
    pid = os.getpid()
    launcher = {"target": "local", "host": socket.gethostname(), "pid": pid, "start_ticks": process_start_ticks(pid)}
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        (log_dir / AGENT_LOG).touch()
        write_atomically(folder / "command.sh", line)
        write_json(folder / "launcher.json", {**launcher, "mark": mark, "time": time.time()})
    except OSError as error:
        raise storage_error("run.dir", plan.folder.path, error) from error


def _start_agent(plan: LaunchPlan, env: Mapping[str, str], log_dir: Path, next_agent: NextAgent) -> subprocess.Popen[bytes]:
    path = log_dir / AGENT_LOG
    with open(path, "ab") as log:
        if (agent := next_agent.begin(plan.argv, env, path)) is not None:
            return agent
        return subprocess.Popen(
            plan.argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _start_guard(mark: str) -> subprocess.Popen[bytes]:
    program = Path(__file__).with_name("parent_guard.py")
    return subprocess.Popen([sys.executable, "-I", "-S", str(program), mark], stdin=subprocess.PIPE, start_new_session=True)


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    """End the guard. BrokenPipeError means that the guard was killed before."""
    try:
        guard.communicate(b"done")
    except BrokenPipeError:
        guard.wait()


def _conclude(folder: RunFolder, claimed: int, log_dir: Path, asked: str) -> LocalRunResult:
    """The result of the attempt, from the outcome that rank 0 wrote and from the failures of the ranks.

    torchrun's exit code is not used, because it only tells whether all ranks ended with 0. `asked`: the state that a forwarded
    signal asked for; empty: no signal came.
    """
    attempt = _begun_attempt(folder, log_dir) or claimed
    failures = tuple(find_failures(log_dir))
    outcome = folder.read_outcome()
    state = outcome.state if outcome is not None and outcome.attempt == attempt else ""
    if failures and failures[0].kind == "bad_input":
        return LocalRunResult(attempt, "bad_input", EXIT_BAD_INPUT, log_dir, failures)
    if not asked and failures and state in ("stopped", "preempted"):
        # Another rank failed and torchrun sent SIGTERM to rank 0. Rank 0 took that signal for a request to stop.
        state = "failed"
    if not state and asked and not any(failure.kind == "exception" for failure in failures):
        # The signal ended the ranks before they had anything to save.
        state = asked
    why = outcome.why if outcome is not None and state == outcome.state else ""
    return LocalRunResult(attempt, state or "died", EXIT_CODE.get(state, EXIT_BROKE), log_dir, failures, why=why)


def _conclude_hang(folder: RunFolder, claimed: int, log_dir: Path, triage: Triage) -> LocalRunResult | None:
    """Record the hang and return the result. None: rank 0 had recorded an outcome before the hang.

    The launcher writes this outcome, because rank 0 hung with the other ranks.
    """
    attempt = _begun_attempt(folder, log_dir) or claimed
    try:
        if not record_hang(folder, attempt, triage):
            return None
    except OSError as error:
        print(f"phalanx: the hang can't be recorded: {error}", file=sys.stderr, flush=True)
    return LocalRunResult(attempt, "hung", EXIT_BROKE, log_dir, (), triage)


def _begun_attempt(folder: RunFolder, log_dir: Path) -> int | None:
    """The number that rank 0 recorded for the attempt with these logs. None: the attempt never began."""
    rows = (row for row in read_events(folder) if row["kind"] == EventKind.ATTEMPT)
    return next((row["attempt"] for row in rows if row.get("logs") == str(log_dir)), None)
