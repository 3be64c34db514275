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

from configs.schema import Config
from pretrain.metrics.sinks import NullSink, Sink
from pretrain.metrics.wandb_copy import GAVE_UP, Job, warn
from pretrain.run.folder import Outcome, RunFolder

DEFAULT_SERVER = "https://api.wandb.ai"
# The process ends itself after finish_timeout_s; this much later it is killed.
_KILL_AFTER_S = 2.0


class WandbSink:
    """The rank's side of the copy."""

    def __init__(self, job: Job, environ: Mapping[str, str]) -> None:
        self._job = job
        root = Path(__file__).resolve().parents[2]
        paths = [str(root), environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.metrics.wandb_copy"],
            stdin=subprocess.PIPE,
            stdout=2,
            env={**environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        )
        self._lost = False
        self._tell(asdict(job))

    def write(self, row: dict[str, Any]) -> None:
        """The copy reads the record itself; here only its health is looked at."""
        if not self._lost and self._process.poll() is not None:
            self._lose(f"the copying process ended by itself (exit code {self._process.returncode})")

    def note(self, text: str) -> None:
        return

    def close(self, outcome: Outcome | None) -> None:
        """Let it send the rest. At most finish_timeout_s and a little; then it is killed, and the next attempt goes on."""
        broke = outcome is None or outcome.state in ("failed", "diverged")
        self._tell({"close": 1 if broke else 0})
        try:
            if self._process.wait(self._job.finish_timeout_s + _KILL_AFTER_S) == 3:
                self._lose(f"not everything was sent within metrics.wandb.finish_timeout_s = {self._job.finish_timeout_s:g}")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._lose("the copying process didn't end, and was killed")

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None, "the copy's stdin is a pipe"
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # It is on its way out: its exit code says whether it has said why.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_AFTER_S)
            self._lose("the copying process is gone")

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
    job = Job(
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
    """online, offline or disabled. auto: as WANDB_MODE says, else online exactly when a key is found."""
    if mode != "auto":
        return mode
    if environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return environ["WANDB_MODE"]
    return "online" if has_key(environ) else "offline"


def has_key(environ: Mapping[str, str]) -> bool:
    """Is there a key where W&B looks for one? The key itself is never read into our variables."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or DEFAULT_SERVER).hostname or ""
    home = Path(environ.get("HOME", "~")).expanduser()
    places = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    return any(_netrc_names(path, host) for path in places)


def _netrc_names(path: Path, host: str) -> bool:
    try:
        return host in netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        # Unreadable or malformed: W&B couldn't read it either.
        return False


def wandb_place(config: Config, folder: RunFolder, environ: Mapping[str, str]) -> str | None:
    """Where the summary sends people for W&B."""
    mode = choose_mode(config.metrics.wandb.mode, environ)
    if "wandb" not in config.metrics.sinks or mode == "disabled":
        return None
    if mode == "online":
        return f"project {config.metrics.wandb.project}, files in {folder.wandb}"
    return f"offline in {folder.wandb}; send with: wandb sync {folder.wandb}/offline-run-*"
