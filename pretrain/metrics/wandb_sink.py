"""W&B as a sink. In: the record's path. Out: a process that copies it (pretrain/metrics/wandb_copy.py), started, watched, ended.

Training never waits for W&B: a row costs one look at the process, the end costs `finish_timeout_s` at most, and every
failure is one warning. Rank 0 only. Keys stay where W&B looks for them, in the environment or in netrc.

Torch-free.
"""

from __future__ import annotations

import json
import netrc
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from configs import own_packages
from configs.schema import Config
from pretrain.metrics.sinks import NullSink, Sink
from pretrain.metrics.wandb_copy import GAVE_UP, CopyJob, warn
from pretrain.run.folder import Outcome, RunFolder

# WANDB_MODE's words, with those of older versions.
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
DEFAULT_SERVER = "https://api.wandb.ai"
# How to reach a W&B service that an ancestor runs.
_FOREIGN_SERVICE = frozenset({"WANDB_SERVICE"})
# Of one attempt: something that kills every copy would go on doing so.
RESTARTS = 3
# The process ends itself after finish_timeout_s; this much later it is killed.
_KILL_AFTER_S = 2.0


class WandbSink:
    """Rank 0's side of the copy: starts the copying process, watches it and ends it."""

    def __init__(self, job: CopyJob, environ: Mapping[str, str]) -> None:
        self._job = job
        self._environ = environ
        self._lost = False
        self._restarts_left = RESTARTS
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        """A copying process that sends what W&B lacks of the record, and then what comes."""
        # A W&B service of the process that started us ends with that process, and takes its clients' runs along.
        inherited = {name: value for name, value in self._environ.items() if name not in _FOREIGN_SERVICE}
        process = subprocess.Popen(
            own_packages.command(sys.executable, "pretrain.metrics.wandb_copy"),
            stdin=subprocess.PIPE,
            stdout=2,
            env=inherited,
        )
        self._tell(process, asdict(self._job))
        return process

    def _restart_if_killed(self) -> None:
        """A copy that somebody killed (the kernel, for its memory) is started again; one that gave up has said why."""
        code = self._process.poll()
        if code is None or code == GAVE_UP or not self._restarts_left:
            return
        self._restarts_left -= 1
        with suppress(OSError):
            self._process = self._start()

    def write(self, row: dict[str, Any]) -> None:
        """The copy reads the record itself; here only its health is looked at."""
        self._restart_if_killed()
        if not self._lost and self._process.poll() is not None:
            self._lose(f"the copying process ended by itself (exit code {self._process.returncode})")

    def show_message(self, text: str) -> None:
        return

    def close(self, outcome: Outcome | None) -> None:
        """Let it send the rest. At most finish_timeout_s and a little; then it is killed, and the next attempt goes on."""
        self._restart_if_killed()
        broke = outcome is None or outcome.state in ("failed", "diverged")
        self._tell(self._process, {"close": 1 if broke else 0})
        try:
            code = self._process.wait(self._job.finish_timeout_s + _KILL_AFTER_S)
            if code == 3:
                self._lose(f"not everything was sent within metrics.wandb.finish_timeout_s = {self._job.finish_timeout_s:g}")
            elif code != 0:
                self._lose(f"the copying process ended by itself (exit code {code})")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._lose("the copying process didn't end, and was killed")

    def _tell(self, process: subprocess.Popen[bytes], order: dict[str, Any]) -> None:
        assert process.stdin is not None, "the copy's stdin is a pipe"
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            # The process is on its way out: `write` and `close` look at its exit code.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_AFTER_S)

    def _lose(self, why: str) -> None:
        """One warning a run; none where the copying process gave its own warning: it ends with exit code 1 then."""
        if not self._lost:
            self._lost = True
            if self._process.poll() != GAVE_UP:
                warn(f"{why}; the next attempt sends what is missing")


def make_wandb_sink(config: Config, folder: RunFolder, wandb_id: str, environ: Mapping[str, str]) -> Sink:
    """The W&B sink that the config asks for; a null sink when it asks for none. Call on rank 0, after the record is open."""
    mode = choose_mode(config.metrics.wandb.mode, environ)
    if "wandb" not in config.metrics.sinks or mode == "disabled":
        return NullSink()
    wandb = config.metrics.wandb
    job = CopyJob(
        run_dir=str(folder.path.resolve()),
        wandb_id=wandb_id,
        mode=mode,
        project=wandb.project,
        name=config.run.name,
        config=asdict(config),
        entity=wandb.entity,
        group=wandb.group,
        tags=list(wandb.tags),
        finish_timeout_s=wandb.finish_timeout_s,
        rank_pid=os.getpid(),
    )
    try:
        return WandbSink(job, environ)
    except OSError as error:
        warn(f"the copying process can't start ({error})")
        return NullSink()


def choose_mode(mode: str, environ: Mapping[str, str]) -> str:
    """online, offline or disabled, for metrics.wandb.mode. auto: as the environment says, else online where a key is found.

    A word in WANDB_MODE that is not known here keeps the run offline: nothing is sent against the user's word.
    """
    if mode != "auto":
        return mode
    if environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    if word := environ.get("WANDB_MODE"):
        return _MODES.get(word.strip().lower(), "offline")
    return "online" if has_key(environ) else "offline"


def has_key(environ: Mapping[str, str]) -> bool:
    """Is there a key where W&B looks for one? The key itself is never read into our variables."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or DEFAULT_SERVER).hostname or ""
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    places = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    return any(_netrc_names(path, host) for path in places)


def _netrc_names(path: Path, host: str) -> bool:
    try:
        return host in netrc.netrc(str(path)).hosts
    except (OSError, ValueError, netrc.NetrcParseError):
        # Unreadable or malformed: W&B couldn't read it either.
        return False


def wandb_place(config: Config, folder: RunFolder, environ: Mapping[str, str]) -> str | None:
    """The place of the W&B run that the summary names: a URL or a folder."""
    mode = choose_mode(config.metrics.wandb.mode, environ)
    if "wandb" not in config.metrics.sinks or mode == "disabled":
        return None
    if mode == "online":
        return f"project {config.metrics.wandb.project}, files in {folder.wandb}"
    return f"offline in {folder.wandb}; send with: wandb sync {folder.wandb}/offline-run-*"
