"""The W&B sink. In: the run folder. Out: a process that copies the record to W&B (pretrain/metrics/wandb_copy.py).

The sink starts, watches and ends that process. Training never waits for W&B: a row costs one poll of the process, the end takes
`finish_timeout_s` and 2 s at most, and a failure is one warning. Rank 0 only. API keys stay in the environment or in netrc.

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
from configs.fields import walk
from configs.schema import Config
from pretrain.metrics.copy_process import GAVE_UP, TOO_LONG, UNUSABLE, warn
from pretrain.metrics.sinks import NullSink, Sink
from pretrain.metrics.store_copy import StoreJob
from pretrain.metrics.wandb_copy import DEFAULT_SERVER, CopyJob
from pretrain.run.folder import Outcome, RunFolder

# The values of WANDB_MODE, also those of older versions of wandb, and their meaning.
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
# The variables by which a W&B client finds the service of another process.
_FOREIGN_SERVICE = frozenset({"WANDB_SERVICE"})
# The number of restarts in one attempt. A cause that killed so many copies would kill the next one too.
RESTARTS = 3
# The copying process ends itself after finish_timeout_s. It is killed so many seconds later.
_KILL_AFTER_S = 2.0


class CopySink:
    """Starts a copying process, watches it, restarts it when it was killed, and ends it."""

    def __init__(self, job: CopyJob | StoreJob, environ: Mapping[str, str]) -> None:
        self._job = job
        self._environ = environ
        self._lost = False
        self._restarts_left = RESTARTS
        self._process = start_copy(job, environ)

    def _restart_if_killed(self) -> None:
        """Start the copy again if it was killed, for example by the kernel when memory ran out.

        A copy that gave up has already printed the reason and is not started again before the end of the run.
        """
        code = self._process.poll()
        if code is None or code in (GAVE_UP, UNUSABLE) or not self._restarts_left:
            return
        self._restarts_left -= 1
        with suppress(OSError):
            self._process = start_copy(self._job, self._environ)

    def write(self, row: dict[str, Any]) -> None:
        """Check that the copying process is alive. It reads the row from the record itself."""
        self._restart_if_killed()
        if not self._lost and self._process.poll() is not None:
            self._lose(f"the copying process ended by itself (exit code {self._process.returncode})")

    def show_message(self, text: str) -> None:
        return

    def close(self, outcome: Outcome | None) -> None:
        """Let the copy send the remaining rows, and kill it after finish_timeout_s and 2 s. The next attempt then sends them.

        A copy that was lost meanwhile is started once more: what ended it may be over.
        """
        if self._process.poll() not in (None, UNUSABLE):
            with suppress(OSError):
                self._process = start_copy(self._job, self._environ)
        broke = outcome is None or outcome.state in ("failed", "diverged")
        tell(self._process, {"close": 1 if broke else 0})
        try:
            code = self._process.wait(self._job.finish_timeout_s + _KILL_AFTER_S)
            if code == TOO_LONG:
                self._lose(f"not everything was sent within finish_timeout_s = {self._job.finish_timeout_s:g}")
            elif code != 0:
                self._lose(f"the copying process ended by itself (exit code {code})")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._lose("the copying process didn't end, and was killed")

    def _lose(self, why: str) -> None:
        """Warn once an attempt that the copy was lost. A process that gave up has warned already."""
        if not self._lost:
            self._lost = True
            if self._process.poll() not in (GAVE_UP, UNUSABLE):
                warn(f"{why}; {self._job.later}", self._job.label)


def start_copy(job: CopyJob | StoreJob, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a copying process, which sends the rows that W&B lacks and then follows the record. Raises OSError."""
    # A W&B service that an ancestor started ends with it, and would end this run too. So the copy starts its own.
    inherited = {name: value for name, value in environ.items() if name not in _FOREIGN_SERVICE}
    process = subprocess.Popen(
        own_packages.command(sys.executable, job.MODULE),
        stdin=subprocess.PIPE,
        stdout=2,
        env=inherited,
    )
    tell(process, asdict(job))
    return process


def tell(process: subprocess.Popen[bytes], order: dict[str, Any]) -> None:
    """Send a line to a copying process. One that is ending does not read it; its exit code tells why."""
    assert process.stdin is not None, "the copy's stdin is a pipe"
    try:
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_AFTER_S)


def make_wandb_sink(config: Config, folder: RunFolder, wandb_id: str, environ: Mapping[str, str]) -> Sink:
    """The W&B sink of the config, or a null sink without one. Rank 0 calls it after the record was opened."""
    job = make_copy_job(config, folder, wandb_id, environ)
    return NullSink() if job is None else _open_sink(job, environ)


def make_store_sink(kind: str, config: Config, folder: RunFolder, line: str, environ: Mapping[str, str]) -> Sink:
    """The sink that copies the record to TensorBoard or MLflow, or a null sink where metrics.sinks doesn't name it."""
    if kind not in config.metrics.sinks:
        return NullSink()
    mlflow = config.metrics.mlflow
    job = StoreJob(
        kind=kind,
        run_dir=str(folder.path.resolve()),
        line=line,
        name=config.run.name,
        config={path: value for path, value, _ in walk(config)},
        uri=mlflow.tracking_uri or environ.get("MLFLOW_TRACKING_URI"),
        experiment=mlflow.experiment,
        finish_timeout_s=mlflow.finish_timeout_s,
    )
    return _open_sink(job, environ)


def _open_sink(job: CopyJob | StoreJob, environ: Mapping[str, str]) -> Sink:
    """The sink of a job, or a null sink and a warning where its process can't start."""
    try:
        return CopySink(job, environ)
    except OSError as error:
        warn(f"the copying process can't start ({error})", job.label)
        return NullSink()


def make_copy_job(config: Config, folder: RunFolder, wandb_id: str, environ: Mapping[str, str]) -> CopyJob | None:
    """What a copying process of this run does. None: the config or the environment wants no W&B."""
    mode = choose_mode(config.metrics.wandb.mode, environ)
    if "wandb" not in config.metrics.sinks or mode == "disabled":
        return None
    wandb = config.metrics.wandb
    return CopyJob(
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
        expert_picture=wandb.expert_picture,
        report=wandb.report,
    )


def choose_mode(mode: str, environ: Mapping[str, str]) -> str:
    """online, offline or disabled. `mode`: metrics.wandb.mode.

    With auto, WANDB_DISABLED and WANDB_MODE decide. Without them the run is online if an API key is found, and offline
    otherwise. An unknown value of WANDB_MODE keeps the run offline, so that nothing is sent against the user's wish.
    """
    if mode != "auto":
        return mode
    if environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    if word := environ.get("WANDB_MODE"):
        return _MODES.get(word.strip().lower(), "offline")
    return "online" if has_key(environ) else "offline"


def has_key(environ: Mapping[str, str]) -> bool:
    """Whether an API key exists where W&B looks for it. The key is neither stored nor returned."""
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
        # W&B can't read an unreadable or malformed netrc either.
        return False


def wandb_place(config: Config, folder: RunFolder, environ: Mapping[str, str]) -> str | None:
    """The project or the folder of the W&B run, as the summary shows it. None: the run has no W&B sink."""
    mode = choose_mode(config.metrics.wandb.mode, environ)
    if "wandb" not in config.metrics.sinks or mode == "disabled":
        return None
    if mode == "online":
        return f"project {config.metrics.wandb.project}, files in {folder.wandb}"
    return f"offline in {folder.wandb}; send with: phalanx wandb {folder.path}"
