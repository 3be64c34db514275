"""The Slurm step of a job's next attempt in place, started while the ranks of this one train. In: the job's command. Out: srun.

The step has the command and the nodes of the attempt that runs, and shares their resources (srun --overlap). On each node the
agent (launch/slurm/node_agent.py) starts a standby (launch/standby.py), says READY on its stdout when the imports are done, and
reads its stdin, which srun hands to all agents.

The next attempt takes the step in two lines, so that it begins on all nodes or on none. The first line has the values of the
placeholders. An agent answers HERE if its standby still waits, else GONE. After HERE from all, the second line lets them go on as
in any other step. In every other case stdin is closed, the agents end, and the attempt gets a step of its own: when the step has
ended, an agent does not answer HERE, imports are not done, or the attempt has other nodes.

Torch-free.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from launch.slurm.job_step import fill, step_words
from launch.standby import WAITS, Standby

READY, HERE, GONE = "ready", "here", "gone"
# Answers come within milliseconds. An agent that takes longer is stopped, or its node is gone and Slurm has not noticed.
_PATIENCE_S = 5.0
_POLL_S = 0.2


class StandbyStep:
    """The batch step's side. `after_s`: how many seconds after the start of an attempt the step of the next one starts; None:
    never. `command`: srun with its arguments.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], after_s: float | None) -> None:
        self._command, self._environ, self._after_s = command, environ, after_s
        self._nodes: tuple[str, ...] = ()
        self._places: dict[str, str] = {}
        self._begun_s = time.monotonic()
        self._step: subprocess.Popen[bytes] | None = None
        # What the agents say. A file in memory, because an unread pipe would block srun.
        self._said = -1

    def look(self) -> None:
        """Start the step of the next attempt when it is due, on the nodes of the attempt that began last."""
        if self._step is not None or self._after_s is None or time.monotonic() - self._begun_s < self._after_s:
            return
        words, env = step_words(self._command, self._places, again=True), {**self._environ, WAITS: "1"}
        try:
            self._said = os.memfd_create("standby")
            self._step = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=self._said, bufsize=0)
        except OSError as error:
            self._after_s = None
            print(f"phalanx: no standby for the next attempt: {error}", flush=True)

    def begin(
        self, nodes: Sequence[str], filled: Mapping[str, str], environ: Mapping[str, str]
    ) -> subprocess.Popen[bytes] | None:
        """The step for the attempt that begins on `nodes`. None: there is none that can be used.

        `filled`: the placeholders of the command and their values. `environ`: the variables that differ between attempts.
        """
        step, fits = self._step, self._nodes == tuple(nodes)
        self._nodes, self._begun_s = tuple(nodes), time.monotonic()
        self._places = {name: filled[name] for name in ("{nodes}", "{node_file}")}
        line = json.dumps({"filled": dict(filled), "environ": dict(environ)})
        taken = step is not None and fits and self._all_say(READY, 0.0) and self._ask(line) and self._ask("begin", wait=False)
        self.drop()
        return step if taken else None

    def drop(self, patience_s: float = 0.0) -> None:
        """Close the step's stdin. Agents that wait for a line then end. Waits for the step's end for at most `patience_s`."""
        step, self._step = self._step, None
        if step is None or step.stdin is None:
            return
        step.stdin.close()
        os.close(self._said)
        with suppress(subprocess.TimeoutExpired):
            step.wait(patience_s)

    def _ask(self, line: str, wait: bool = True) -> bool:
        """Write a line, and wait for all answers. The line is shorter than a pipe holds, so that a stopped srun blocks nobody."""
        assert self._step is not None and self._step.stdin is not None
        try:
            self._step.stdin.write(f"{line}\n".encode())
        except BrokenPipeError:
            return False
        return not wait or self._all_say(HERE, _PATIENCE_S)

    def _all_say(self, word: str, patience_s: float) -> bool:
        assert self._step is not None
        deadline = time.monotonic() + patience_s
        while self._step.poll() is None:
            said = os.pread(self._said, os.fstat(self._said).st_size, 0).decode(errors="replace").split()
            if said.count(word) == len(self._nodes):
                return True
            if GONE in said or time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return False


def wait_for_attempt(argv: Sequence[str], standby: Standby) -> list[str]:
    """The agent's side: the arguments `argv` with the attempt's values, when the attempt begins. Empty: no attempt comes.

    The variables of the attempt are set in os.environ, and stdout goes where stderr goes.
    """
    while not standby.is_ready:
        if select.select([sys.stdin], [], [], _POLL_S)[0]:
            return []
    print(READY, flush=True)
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        return []
    print(HERE if standby.is_ready else GONE, flush=True)
    if not sys.stdin.readline().endswith("\n"):
        return []
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    begin = json.loads(line)
    os.environ.update(begin["environ"])
    return fill(argv, begin["filled"])
