"""The agent of one node: python -m launch.slurm.node_agent --attempt-dir DIR --log-dir DIR --policy JSON -- torchrun's command.

Each task of the Slurm step runs this agent. The agent starts torchrun, hands each signal to the ranks once, watches the
ranks' heartbeats, and reports the state of this node in ATTEMPT_DIR/nodes/HOSTNAME.json. The agent ends no run. The batch
step (launch/slurm/batch_step.py) decides whether the run hangs, because it sees all nodes. The exit code is torchrun's. If
signal n ended torchrun before there were ranks, the exit code is 128 + n.

Slurm signals every process of a step. torchrun would pass the signal on a second time, and would kill the ranks 30 s later
in the middle of a save. torchrun's command therefore has --signals-to-handle SIGQUIT, and torchrun inherits the other
signals as ignored. The ranks install handlers of their own. The agent keeps a signal until a rank has done so.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

from configs.errors import ConfigError
from launch.local.parent_guard import LINGER_S, MARK_NAME, clear_up
from launch.local.scratch import scratch_folder
from launch.slurm.rendezvous import resolves
from launch.slurm.standby_step import wait_for_attempt
from launch.standby import WAITS, Standby
from launch.watch.failures import AGENT_LOG, GATHERED, NO_RANK, Failure, find_failures
from launch.watch.gathered_logs import GatheredLogs
from launch.watch.hang import HangWatch
from launch.watch.heartbeats import NodeReport, WatchPolicy, write_report
from launch.watch.processes import catches, ranks_of
from pretrain.rank.log_file import guard_logs
from pretrain.run.beat import BEAT_DIR
from pretrain.run.files import write_atomically
from pretrain.run.folder import EXIT_BROKE
from pretrain.run.process import die_with_parent, node_name

POLL_S = 0.2
_LOOK_S = 1.0
# Signals within this many seconds of the first one are the same request, because Slurm signals every process of a step.
REPEAT_S = 5.0
# Signal received → signal sent to the ranks. SIGHUP becomes SIGTERM, because a rank under nohup ignores SIGHUP.
_SIGNALS = {number: number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)} | {signal.SIGHUP: signal.SIGTERM}


class RankSignals:
    """Hands each request to every rank once, as soon as the rank catches it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: list[int] = []
        self._asked: list[int] = []
        self._first_s = 0.0
        self._delivered: set[tuple[int, int]] = set()

    def install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, lambda received, _: self._waiting.append(_SIGNALS[signal.Signals(received)]))

    @property
    def asked(self) -> int:
        """The first signal that was received, or 0."""
        return [*self._asked, *self._waiting, 0][0]

    def deliver(self, ranks: Sequence[int]) -> None:
        """Send each requested signal to the processes of `ranks` that catch it and have not had it yet. `ranks` are pids."""
        while self._waiting:
            number = self._waiting.pop(0)
            if not self._asked:
                self._first_s = self._clock()
            elif self._clock() - self._first_s < REPEAT_S:
                continue
            self._asked.append(number)
        for place, number in enumerate(self._asked):
            for pid in ranks:
                if (place, pid) not in self._delivered and catches(pid, number):
                    self._delivered.add((place, pid))
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        continue


class NodeAgent:
    """Runs and watches one torchrun and its ranks.

    `beats` and `own_logs` are folders on this machine. `own_logs` is None if logs are not gathered.
    """

    def __init__(
        self, attempt_dir: Path, log_dir: Path, policy: WatchPolicy, node: str, beats: Path, own_logs: Path | None
    ) -> None:
        self._attempt_dir, self._log_dir, self._policy, self._node = attempt_dir, log_dir, policy, node
        self._beats, self._logs = beats, own_logs or log_dir
        self._agent_log = self._logs / (AGENT_LOG if own_logs else f"{node}.{AGENT_LOG}")
        self._gathered = GatheredLogs(own_logs, log_dir, node) if own_logs else None
        self._hang = HangWatch(beats, policy, node)
        self._look_s = self._report_s = 0.0
        self._had_ranks = False
        self._refused = ""

    def run(self, command: Sequence[str], environ: Mapping[str, str], standby: Standby | None) -> int:
        """Run torchrun to its end and return the exit code. Raises OSError if torchrun cannot be started.

        `standby`: a torchrun that waits for `command`, or None.
        """
        signals = RankSignals()
        signals.install()
        mark = standby.mark if standby is not None else environ.get(MARK_NAME) or secrets.token_hex(8)
        torchrun = self._start(command, {**environ, MARK_NAME: mark}, standby)
        while (code := torchrun.poll()) is None:
            time.sleep(POLL_S)
            if signals.asked:
                self._forward(signals, torchrun)
            if (now_s := time.monotonic()) >= self._look_s:
                self._look_s = now_s + _LOOK_S
                self._look(now_s)
        # A rank that was being forked when torchrun was killed has not yet asked the kernel to end it with its parent.
        clear_up(mark, LINGER_S if code >= 0 else 0.0)
        self._end(code)
        if code < 0:
            return 128 + (signals.asked or -code)
        return code

    def _start(self, command: Sequence[str], environ: Mapping[str, str], standby: Standby | None) -> subprocess.Popen[bytes]:
        for folder in (self._log_dir, self._attempt_dir / "nodes"):
            folder.mkdir(parents=True, exist_ok=True)
        env = {**environ, BEAT_DIR: str(self._beats), "PHALANX_LOG_DIR": str(self._logs)}
        with open(self._agent_log, "ab") as log:
            if standby is not None and (torchrun := standby.begin(command, env, self._agent_log)) is not None:
                return torchrun
            return subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_as_child
            )

    def _forward(self, signals: RankSignals, torchrun: subprocess.Popen[bytes]) -> None:
        ranks = ranks_of(torchrun.pid)
        # The signal may have reached the ranks directly, and they may have ended since.
        self._had_ranks = self._had_ranks or bool(ranks) or any(self._beats.glob("rank_*.beat"))
        signals.deliver(ranks)
        if not self._had_ranks:
            # Without ranks there is nothing to save. torchrun ignores the signal, so it is killed.
            torchrun.kill()

    def _look(self, now_s: float) -> None:
        changed = self._hang.look()
        self._had_ranks = self._had_ranks or any(state.pid for state in self._hang.states)
        if changed and self._hang.stacks:
            # If logs are gathered, the stacks are gathered as one more log of this node.
            path = self._log_dir / f"{self._node}.stacks.txt" if self._gathered is None else self._logs / "stacks.log"
            self._write_if_possible(lambda: write_atomically(path, self._hang.stacks))
        if changed or now_s >= self._report_s:
            self._report_s = now_s + self._policy.report_interval_s
            self._report(None, ())
        if self._gathered is not None:
            self._write_if_possible(self._gathered.pump)

    def _end(self, code: int) -> None:
        failures = [replace(failure, node=failure.node or self._node) for failure in find_failures(self._logs)]
        failures = [failure for failure in failures if failure.node == self._node]
        if self._gathered is not None:
            gathered = self._gathered
            self._write_if_possible(lambda: gathered.close(failures))
        self._hang.look()
        self._report(code, failures)

    def _report(self, exit_code: int | None, failures: Sequence[Failure]) -> None:
        found = tuple(asdict(failure) for failure in failures)
        hang = self._hang
        report = NodeReport(self._node, time.time(), os.getpid(), exit_code, hang.hung, tuple(hang.states), found)
        self._write_if_possible(lambda: write_report(self._attempt_dir, report))

    def _write_if_possible(self, write: Callable[[], None]) -> None:
        """Call `write`. A failure is printed once and the next call tries again.

        A shared file system that is full or away for a while must not end training.
        """
        try:
            write()
        except OSError as error:
            if str(error) != self._refused:
                self._refused = str(error)
                print(f"phalanx: {self._node}: {error}", file=sys.stderr, flush=True)


def fill_command(command: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command with {is_host} and {local_addr} replaced. Both values differ from node to node.

    torchrun would decide by comparing names and addresses which node is the host. That fails where a node knows itself as
    127.0.1.1 (Debian), or where its Slurm name is not its host name. Node 0 of the step is the host by definition.
    """
    words = {"{is_host}": "1" if environ.get("SLURM_NODEID", "0") == "0" else "0", "{local_addr}": _own_address(command)}
    for placeholder, value in words.items():
        command = [word.replace(placeholder, value) for word in command]
    return list(command)


def _own_address(command: Sequence[str]) -> str:
    """How other nodes reach this one: its own name, or the address of its route to the host where the name has no address."""
    name = socket.getfqdn()
    endpoint = next((after for word, after in pairwise(command) if word == "--rdzv-endpoint"), "")
    host, _, port = endpoint.rpartition(":")
    if resolves(name) or not host:
        return name
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # A datagram socket sends nothing at connect. The kernel only chooses the route.
            probe.connect(address)
            return probe.getsockname()[0]
    except (OSError, ValueError):
        return name


def _as_child() -> None:
    """Prepare the forked child before it runs torchrun: it ignores the signals, and ends when the agent ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def main(argv: Sequence[str]) -> int:
    guard_logs()
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm.node_agent", description="Runs and watches one node's torchrun."
    )
    parser.add_argument("--attempt-dir", type=Path, required=True, help="launch/attempt_N of the run folder")
    parser.add_argument("--log-dir", type=Path, required=True, help="logs/attempt_N of the run folder")
    parser.add_argument(
        "--policy", type=WatchPolicy.from_json, required=True, help="launch/watch/heartbeats.py's WatchPolicy as JSON"
    )
    parser.add_argument("command", nargs="+", help="torchrun's command, after --")
    found, standby = parser.parse_args(list(argv)), None
    if os.environ.pop(WAITS, ""):
        standby = Standby(found.command, os.environ, preexec_fn=_as_child)
        argv = wait_for_attempt(argv, standby)
        if not argv:
            standby.kill()
            return 0
        found = parser.parse_args(argv)
    try:
        return _run_agent(found, standby)
    except ConfigError as error:
        return _refuse(found.log_dir, node_name(os.environ), str(error))


def cores_note(cores: int, ranks: int, node: str) -> str:
    """A line about a node whose ranks share cores, or an empty text. Slurm grants one core unless it is asked for more."""
    if cores >= ranks:
        return ""
    return (
        f"phalanx: note: {node}: {ranks} ranks may use {cores} core{'s' if cores > 1 else ''} in all; "
        "set launch.slurm.cpus_per_task, or --exclusive in launch.slurm.extra"
    )


def _run_agent(found: argparse.Namespace, standby: Standby | None) -> int:
    note = cores_note(len(os.sched_getaffinity(0)), found.policy.processes_per_node, node_name(os.environ))
    if note and os.environ.get("SLURM_NODEID", "0") == "0":
        print(note, file=sys.stderr, flush=True)
    with ExitStack() as stack:
        beats = stack.enter_context(scratch_folder("beats", in_memory=True))
        own_logs = stack.enter_context(scratch_folder("logs")) if found.policy.gather else None
        agent = NodeAgent(found.attempt_dir, found.log_dir, found.policy, node_name(os.environ), beats, own_logs)
        return agent.run(fill_command(found.command, os.environ), os.environ, standby)


def _refuse(log_dir: Path, node: str, why: str) -> int:
    """Leave the reason where the batch step looks for failures. The node is to blame: others may have room."""
    print(f"phalanx: {node}: {why}", file=sys.stderr, flush=True)
    log_dir.mkdir(parents=True, exist_ok=True)
    row = json.dumps(asdict(Failure(NO_RANK, time.time(), "exception", why, node)))
    write_atomically(log_dir / f"{node}{GATHERED}", row + "\n")
    return EXIT_BROKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
