"""A torchrun that waits for its attempt with its libraries imported. In: torchrun's command. Out: the process, when it begins.

The supervisor of an attempt, which is the local launcher or a node's agent under Slurm, starts the standby of the next attempt
while the ranks train. The standby is an ordinary torchrun (launch/torchrun.py), with WAITS in its environment. It imports what
its ranks import, names itself "standby", and reads one line from its stdin: what only the beginning of its attempt tells. It then
forks the fork server and goes on as any torchrun. It has neither threads nor a CUDA context before.

The standby of an attempt is no part of any other attempt. It dies with its supervisor. A standby that is gone, stopped or still
importing is killed, and torchrun is started as without it. Where memory runs out, the kernel kills the standby before any rank.

Torch-free.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.fork_server import import_for_ranks
from launch.local.parent_guard import MARK_NAME
from launch.watch.processes import STANDBY, name_of, state_of
from pretrain.rank.log_file import guard_logs
from pretrain.run.process import die_with_parent, name_process

WAITS = "PHALANX_STANDBY"
# A standby that takes longer to read its line is stopped, or sleeps in the kernel.
_PATIENCE_S = 5.0
# How much the kernel likes to kill a process when memory runs out. Forked processes inherit the value.
_OOM = Path("/proc/self/oom_score_adj")


class Standby:
    """The supervisor's side. `mark`: the launch's mark that the process carries, and that its attempt must have."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        start_new_session: bool = False,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        """`start_new_session`, `preexec_fn`: as Popen has them. Raises OSError."""
        self.mark = secrets.token_hex(8)
        self._environ = {**environ, MARK_NAME: self.mark}
        self._process = subprocess.Popen(
            command,
            env={**self._environ, WAITS: "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=start_new_session,
            preexec_fn=preexec_fn,
        )

    @property
    def is_ready(self) -> bool:
        """Has it imported everything, and is it alive?"""
        pid = self._process.pid
        return self._process.poll() is None and name_of(pid) == STANDBY and state_of(pid, 0) == "alive"

    def begin(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> subprocess.Popen[bytes] | None:
        """Let the process run `command`, whose words may differ from those that it was started with, but not their number.

        Its output goes to the end of the file `log`. None: it was not ready, and is dead.
        """
        late = {name: value for name, value in environ.items() if self._environ.get(name) != value}
        line = json.dumps({"command": list(command), "environ": late, "log": str(log.absolute())}) + "\n"
        if self.is_ready and self._send(line.encode()):
            deadline = time.monotonic() + _PATIENCE_S
            while self._process.poll() is None and time.monotonic() < deadline:
                if name_of(self._process.pid) != STANDBY:
                    return self._process
                time.sleep(0.005)
        self.kill()
        return None

    def _send(self, line: bytes) -> bool:
        """Whether the process still reads. The line is shorter than a pipe holds, so that a stopped process blocks nobody."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.close()
        except BrokenPipeError:
            return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def wait_for_attempt(program: str, words: Sequence[str]) -> None:
    """The process's side: import what `program` imports with the arguments `words`, and return when the attempt begins.

    sys.argv, the environment and the standard streams are then those of the attempt. The process ends if none comes, and starts
    anew if an import has left something behind that does not survive a fork.
    """
    del os.environ[WAITS]
    die_with_parent()
    # 1000: the first to be killed.
    liked = _OOM.read_text()
    _OOM.write_text("1000")
    why_not, name = import_for_ranks(program, words), name_of(os.getpid())
    name_process(STANDBY)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        os._exit(0)
    _OOM.write_text(liked)
    name_process(name)
    begin = json.loads(line)
    os.environ.update(begin["environ"])
    _redirect_streams(begin["log"])
    if why_not:
        os.execv(begin["command"][0], begin["command"])
    sys.argv[1:] = begin["command"][1 - len(sys.argv) :]


def _redirect_streams(log: str) -> None:
    """stdin from /dev/null, stdout and stderr to the end of the file `log`."""
    for stream in (sys.stdout, sys.stderr):
        # What the imports printed belongs to no attempt.
        stream.flush()
    for path, flags, descriptors in ((os.devnull, os.O_RDONLY, (0,)), (log, os.O_WRONLY | os.O_APPEND, (1, 2))):
        opened = os.open(path, flags)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    guard_logs()
