"""A run on this machine that gets blows. In: a `Case`. Out: a `Struck` for each blow that came, and a finished run."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.watch.processes import FORK_SERVER
from tests.chaos.moments import Missed, caught
from tests.chaos.plan import FULL_DISK, Blow, Case
from tests.run.world import Command, attempt_of, launch

SETTLE_S = 180.0
# For a rank that is stopped on purpose. On a busy machine a step of a healthy run may take some seconds, too.
WATCHFUL = "launch.watch.step_timeout_s=20"
# A save fails at once, but on a busy machine it may take long until it is tried.
FULL_S = 4.0
FILLER = "filler"


@dataclass(frozen=True)
class Struck:
    """A blow that came: what rank 0 did then, in which step and attempt, how long until the run had ended or went on."""

    way: str
    moment: str
    step: int
    attempt: int
    seconds: float


def fill(folder: Path) -> None:
    """Leave no byte on the folder's file system."""
    # Unbuffered: closing the file has nothing left to write.
    with open(folder / FILLER, "wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(b"x" * 65536)


def empty(folder: Path) -> None:
    """Give the room back, after time for a save to fail."""
    time.sleep(FULL_S)
    (folder / FILLER).unlink()


class LocalRun:
    """`phalanx launch`, as often as it takes."""

    def __init__(self, case: Case, config: Path, run_dir: Path, last: int, *words: str) -> None:
        self.config, self.run_dir, self.last = config, run_dir, last
        self.words = [*words, WATCHFUL]
        self.words += ["launch.restart.max_local=9", "launch.restart.standby_after_s=0"] if case.in_place else []
        # The newest attempt that a blow ended, and the newest that a blow may end later.
        self.struck_attempt = self.excused = 0
        self.command = self._launch()

    def strike(self, blow: Blow) -> list[Struck]:
        """Raises Missed when the run has finished before."""
        if self._is_over():
            if self.command.folder.done.exists():
                raise Missed
            self._launch_again()
        with caught(self._rank_0, self._is_over, blow, self.last) as beat:
            attempt = self.command.folder.claimed_attempts()[-1]
            began_s = time.monotonic()
            self._act(blow)
        self.excused = attempt
        if blow.way == FULL_DISK:
            empty(self.run_dir.parent)
        else:
            self.struck_attempt = attempt
            self._settle()
        return [Struck(blow.way, beat.phase, beat.step, attempt, time.monotonic() - began_s)]

    def finish(self) -> None:
        """Start it again until it is done."""
        while self.command.end() != 0 or not self.command.folder.done.exists():
            self._launch_again()

    def end(self) -> None:
        """Whatever is left of it."""
        self.command.process.kill()
        self.command.process.communicate()

    def warm_attempts(self) -> set[int]:
        """Of a local run, nothing tells them."""
        return set()

    def _launch(self) -> Command:
        return launch(self.config, self.run_dir, *self.words)

    def _launch_again(self) -> None:
        """An attempt that no blow hit must not have ended before the run's end."""
        self.command.end()
        newest = max(self.command.folder.claimed_attempts(), default=0)
        assert newest == self.excused, f"attempt {newest} failed by itself, or none began: {self.command.errors}"
        self.excused = 0
        self.command = self._launch()

    def _is_over(self) -> bool:
        return self.command.process.poll() is not None

    def _rank_0(self) -> psutil.Process | None:
        """Of an attempt that got no blow."""
        with suppress(psutil.NoSuchProcess, OSError):
            for rank in self.command.ranks()[:1]:
                if attempt_of(rank) > self.struck_attempt:
                    return rank
        return None

    def _settle(self) -> None:
        """Until the launcher has ended, or has started the next attempt by itself."""
        deadline = time.monotonic() + SETTLE_S
        while not self._is_over() and self._rank_0() is None:
            assert time.monotonic() < deadline, f"nothing followed the blow to attempt {self.struck_attempt}"
            time.sleep(0.05)

    def _act(self, blow: Blow) -> None:
        if blow.way == FULL_DISK:
            fill(self.run_dir.parent)
            return
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(self._victim(blow), _SIGNALS.get(blow.way, signal.SIGKILL))

    def _victim(self, blow: Blow) -> int:
        if blow.way in ("SIGKILL the launcher", "SIGTERM"):
            return self.command.process.pid
        agent, ranks = self.command.agent(), self.command.ranks()
        if agent is None or not ranks:
            raise ProcessLookupError
        if blow.way == "SIGKILL torchrun's agent":
            return agent.pid
        if blow.way == "SIGKILL the fork server":
            (server,) = [process.pid for process in agent.children() if process.name() == FORK_SERVER]
            return server
        return ranks[blow.victim % len(ranks)].pid


_SIGNALS = {"SIGSTOP a rank": signal.SIGSTOP, "SIGTERM": signal.SIGTERM}
