"""The process that copies the record to W&B. In: a `CopyJob` as a JSON line on stdin, and the growing metrics.jsonl.

W&B may hang, crash or fill the memory. In a process of its own that doesn't affect training. The process ends at the line
{"close": exit code} from rank 0, or soon after the death of rank 0 closes the pipe. Rank 0 kills it when it takes too long. Every
step is logged once. The call leaves out `step=`, because W&B drops rows below its own step counter; `step` is the x axis.

Torch-free.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlparse

from parallel.compat.wandb_files import SegmentReader
from pretrain.metrics.copy_process import POLL_S, Orders, exit_code_of, one_line, run_copy, warn
from pretrain.metrics.goodput import read_goodput
from pretrain.metrics.wandb_extras import add_expert_picture, add_report
from pretrain.metrics.wandb_steps import Cursor, copy_lock, mark_synced, steps_offline, to_spans
from pretrain.run.evaluations import newest_scores
from pretrain.run.folder import RunFolder
from pretrain.run.follow import RecordFollower

CURSOR_S = 5.0
INIT_TIMEOUT_S = 30.0
FLUSH_S = 2.0
# In seconds. A server in the same building and one across the world answer within this time.
CONNECT_S = 3.0
# In seconds, and how often the server is asked what has arrived.
ASK_S, ASK_TIMES = 10, 4
DEFAULT_SERVER = "https://api.wandb.ai"
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class CopyJob:
    """The task of the copying process. The API key stays in the environment or in netrc.

    `mode`: online or offline. `falls_back`: write offline when the server refuses; otherwise the copy gives up.
    `expert_picture`, `report`: at the end, add the load of the experts as a picture, and the page of the run as an artifact.
    """

    run_dir: str
    wandb_id: str
    mode: str
    project: str
    name: str
    config: dict[str, Any]
    MODULE: ClassVar[str] = "pretrain.metrics.wandb_copy"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    finish_timeout_s: float = 30.0
    rank_pid: int = 0
    falls_back: bool = True
    expert_picture: bool = False
    report: bool = False

    @property
    def label(self) -> str:
        return "W&B"

    @property
    def remedy(self) -> str:
        """Nothing: wandb is installed with Phalanx."""
        return ""

    @property
    def later(self) -> str:
        """What sends the rows that a copy has lost."""
        return f"the next attempt or phalanx wandb {self.run_dir} sends what is missing"


class Copy:
    """The W&B session of a copying process."""

    def __init__(self, job: CopyJob) -> None:
        self._job = job
        self._folder = RunFolder(Path(job.run_dir))
        self._cursor = Cursor(self._folder)
        self._wandb = _import_wandb()
        mark_synced(self._folder, job.wandb_id, only_empty=True)
        self._run, self.is_online = _start(self._wandb, job)
        self._sent = self._steps_there()
        lacking = next(step for step in count(1) if step not in self._sent)
        self._rows = RecordFollower(self._folder.metrics, first_step=lacking)
        self._reader = SegmentReader(Path(self._run.dir).parent / f"run-{job.wandb_id}.wandb")
        self._logged: set[int] = set()
        self._own_steps: set[int] = set()
        self._is_refused = False
        self._cursor.mode = job.mode
        self._save_cursor()

    def send(self) -> None:
        """Log the rows of the record that W&B lacks. Every CURSOR_S seconds, save which steps have reached W&B's file."""
        for row in self._rows.poll():
            if row["step"] not in self._sent:
                self._run.log({key: value for key, value in row.items() if value is not None})
                self._sent.add(row["step"])
                self._logged.add(row["step"])
        if time.monotonic() - self._cursor_s > CURSOR_S:
            self._save_cursor()

    def finish(self, exit_code: int) -> int:
        """Send the remaining rows and the run's goodput, wait for W&B, and record which steps it has.

        Returns the number of steps that did not arrive at the server, or offline in the file.
        """
        self.send()
        place = f"{self._run.entity}/{self._run.project}/{self._job.wandb_id}"
        if goodput := read_goodput(self._folder, time.time()):
            self._run.summary.update({"goodput": goodput.as_dict()})
        if scores := newest_scores(self._folder):
            self._run.summary.update({"evaluation": scores})
        if self._job.expert_picture:
            add_expert_picture(self._wandb, self._run, self._folder)
        if self._job.report:
            add_report(self._wandb, self._run, self._folder, self._job.finish_timeout_s / 2)
        self._run.finish(exit_code=exit_code)
        # Offline, finish returns before wandb-core has written the file. teardown waits for wandb-core.
        self._wandb.teardown()
        self._save_cursor()
        # finish returns without an error after the server took no rows, or a full disk no file. So both are looked at.
        newest = max(self._sent, default=0)
        if self.is_online:
            self._cursor.server_step = self._ask_server(place, newest)
            lacking = newest - self._cursor.server_step
            if not lacking:
                mark_synced(self._folder, self._job.wandb_id)
            self._save_cursor()
            return lacking
        return len(self._logged - self._own_steps)

    def _ask_server(self, place: str, newest: int) -> int:
        """The newest step that the server has of the run at `place`, which is ENTITY/PROJECT/ID. It may need a moment."""
        step = 0
        for _ in range(ASK_TIMES):
            step = int(self._wandb.Api(timeout=ASK_S).run(place).summary.get("step") or 0)
            if step >= newest:
                break
            time.sleep(POLL_S)
        return min(step, newest)

    def _steps_there(self) -> set[int]:
        offline = steps_offline(self._folder, self._job.wandb_id, self._cursor)
        if not self.is_online:
            return offline
        # Rows are sent in order, so the server has every step up to the newest one of its summary.
        self._cursor.server_step = int(self._run.summary.get("step") or 0)
        return set(range(1, self._cursor.server_step + 1))

    def _save_cursor(self) -> None:
        self._cursor_s = time.monotonic()
        self._own_steps |= {int(row["step"]) for row in self._reader.poll() if "step" in row}
        self._cursor.segments[self._reader.path.parent.name] = to_spans(self._own_steps)
        try:
            self._cursor.save()
        except OSError as error:
            # The next save of the cursor, or the next attempt's look into the files, makes up for it.
            if not self._is_refused:
                warn(f"the cursor can't be written ({error.strerror or error})")
            self._is_refused = True


def _import_wandb() -> Any:
    import wandb  # noqa: PLC0415  a second of start-up, and its absence is a warning, not an error

    return wandb


def _start(wandb: Any, job: CopyJob) -> tuple[Any, bool]:
    """(W&B's run, whether it is online). When the server refuses or can't be reached, the run is offline, with one warning."""
    if job.mode == "online":
        try:
            return _init(wandb, job, "online"), True
        except Exception as error:
            # Without teardown, wandb-core regards the id of the refused run as in use.
            wandb.teardown()
            if not job.falls_back:
                raise
            warn(f"no online run ({type(error).__name__}: {one_line(error)}); writing offline, phalanx wandb RUN_DIR sends it")
    return _init(wandb, job, "offline"), False


def _init(wandb: Any, job: CopyJob, mode: str) -> Any:
    wanted = {
        "console": "off",
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "init_timeout": INIT_TIMEOUT_S,
        "x_save_requirements": False,
        "x_stats_pid": job.rank_pid or os.getpid(),
        "x_stats_sampling_interval": 30.0,
        "x_transaction_log_flush_interval": FLUSH_S,
    }
    settings = wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})
    run = wandb.init(
        id=job.wandb_id,
        resume="allow",
        mode=mode,
        project=job.project,
        entity=job.entity,
        group=job.group,
        tags=job.tags or None,
        name=job.name,
        config=job.config,
        dir=job.run_dir,
        settings=settings,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def follow(job: CopyJob, orders: Orders) -> None:
    """Copy rows until rank 0 sends a line or is gone."""
    copy = Copy(job)
    copy.send()
    while (line := orders.next(POLL_S)) is None:
        copy.send()
    exit_code = exit_code_of(line)
    lacking = copy.finish(exit_code)
    if line and not copy.is_online:
        lacking = _send_late(job, lacking, exit_code)
    if lacking:
        warn(f"{lacking} steps did not arrive; phalanx wandb {job.run_dir} sends them")


def _send_late(job: CopyJob, lacking: int, exit_code: int) -> int:
    """At the end of a run, send what the server refused at its start, and the `lacking` steps that a full disk refused.

    Returns the number of steps that did not arrive.
    """
    is_online = job.mode == "online" and _server_answers(os.environ)
    if not is_online and not lacking:
        return 0
    try:
        late = Copy(replace(job, mode="online" if is_online else "offline", falls_back=False))
    except Exception:
        # The server refuses again. The warning of the start says what to do.
        return lacking
    return late.finish(exit_code)


def _server_answers(environ: Mapping[str, str]) -> bool:
    """Whether the W&B server takes connections. Behind a proxy nobody can tell, and it is asked anyway.

    W&B itself would try for INIT_TIMEOUT_S, while the nodes of the run wait.
    """
    if any(environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")):
        return True
    server = urlparse(environ.get("WANDB_BASE_URL") or DEFAULT_SERVER)
    try:
        socket.create_connection((server.hostname or "", server.port or _PORTS.get(server.scheme, 443)), CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True


def main() -> int:
    return run_copy(CopyJob, lambda job: copy_lock(RunFolder(Path(job.run_dir))), follow)


if __name__ == "__main__":
    sys.exit(main())
