"""Commands of the user's that run beside the training after each complete save: `checkpoint.after_save`. Rank 0 only.

One set of commands runs at a time, in a thread. Of the checkpoints that are saved meanwhile the newest one is next; the others
are passed over. The commands get PHALANX_RUN_DIR, PHALANX_CHECKPOINT and PHALANX_STEP, none of the variables of a rank, and the
programs of the run's Python first on their PATH. A command that fails is told on stderr and changes nothing.

Torch-free.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.run.folder import Outcome, RunFolder
from pretrain.run.journal import say

# What torchrun and Slurm tell a rank about its place. A command that found it would take itself for a rank.
_OF_A_RANK = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
              "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
_PREFIXES = ("TORCHELASTIC_", "PHALANX_BEAT", "PMI_", "PMIX_", "OMPI_")
_KILL_AFTER_S = 5.0


class AfterSave:
    """Runs the commands for the newest checkpoint. Closed at the end of the attempt."""

    def __init__(self, commands: Sequence[str], timeout_s: float, folder: RunFolder, environ: Mapping[str, str]) -> None:
        """`timeout_s`: how long one command may run, and how long a finished run waits for those of its last checkpoint."""
        self._commands, self._timeout_s, self._folder = list(commands), timeout_s, folder
        self._environ = {name: value for name, value in environ.items() if not _is_of_a_rank(name)}
        self._environ["PATH"] = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), environ.get("PATH"))))
        self._changed = threading.Condition()
        self._next: tuple[Path, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # No more saves come; the commands that run are of no use any more.
        self._is_closing = self._is_aborted = False
        self._thread: threading.Thread | None = None

    def saved(self, checkpoint: Path, step: int) -> None:
        """A checkpoint is complete. Returns at once."""
        if not self._commands:
            return
        with self._changed:
            self._next = checkpoint, step
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="after save", daemon=True)
            self._thread.start()

    def sync(self) -> None:
        """Nothing here belongs to the record."""

    def close(self, outcome: Outcome) -> None:
        """Wait for the commands of the last checkpoint if the run is finished; otherwise end them."""
        if self._thread is None:
            return
        with self._changed:
            self._is_closing = True
            if outcome.state != "finished":
                self._next, self._is_aborted = None, True
                self._end_process(signal.SIGTERM)
            self._changed.notify()
        self._thread.join(self._timeout_s if outcome.state == "finished" else _KILL_AFTER_S)
        with self._changed:
            self._is_aborted = True
            self._end_process(signal.SIGKILL)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._is_closing)
                if self._next is None:
                    return
                (checkpoint, step), self._next = self._next, None
            for command in self._commands:
                if not self._is_aborted:
                    self._run(command, checkpoint, step)

    def _run(self, command: str, checkpoint: Path, step: int) -> None:
        log = self._folder.path / "logs" / "after_save" / f"step_{step:07d}.log"
        own = {
            "PHALANX_RUN_DIR": str(self._folder.path.absolute()),
            "PHALANX_CHECKPOINT": str(checkpoint.absolute()),
            "PHALANX_STEP": str(step),
        }
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as out, self._changed:
                if self._is_aborted:
                    return
                self._process = process = subprocess.Popen(
                    ["bash", "-c", command],
                    env=self._environ | own,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            say(f"checkpoint.after_save: {command}: not started ({error.strerror or error}); training goes on")
            return
        try:
            code = process.wait(self._timeout_s)
            why = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"not done after {self._timeout_s:g} s (checkpoint.after_save_timeout_s)"
        with self._changed:
            self._end_process(signal.SIGKILL)
            self._process = None
        if why and not self._is_aborted:
            say(f"checkpoint.after_save: {command}: {why}; its output is in {log}; training goes on")

    def _end_process(self, number: signal.Signals) -> None:
        """Signal the command and its children, if it still runs. The caller holds `_changed`."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)


def _is_of_a_rank(name: str) -> bool:
    return name in _OF_A_RANK or name.startswith(_PREFIXES)
