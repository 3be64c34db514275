"""The process that copies the record to TensorBoard's event files or to MLflow. In: a `StoreJob` as a JSON line on stdin.

It follows the growing metrics.jsonl as the copy to W&B does (pretrain/metrics/wandb_copy.py), and ends by the same orders. A
store says on opening which steps it has, so each step is there once, however many attempts a run has and whenever one is killed.

Torch-free.
"""

from __future__ import annotations

import fcntl
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pretrain.metrics.mlflow_store import MlflowStore
from pretrain.metrics.tensorboard_store import TensorboardStore
from pretrain.metrics.wandb_copy import GAVE_UP, POLL_S, UNUSABLE, Orders, one_line, warn
from pretrain.run.folder import RunFolder
from pretrain.run.follow import RecordFollower


@dataclass(frozen=True)
class StoreJob:
    """The task of the copying process.

    `kind`: tensorboard or mlflow. `line`: the id of the run, another one after going back to an earlier checkpoint.
    `uri`, `experiment`: of MLflow.
    """

    MODULE: ClassVar[str] = "pretrain.metrics.store_copy"
    LABELS: ClassVar[dict[str, str]] = {"tensorboard": "TensorBoard", "mlflow": "MLflow"}
    later: ClassVar[str] = "the next attempt sends what is missing"
    kind: str
    run_dir: str
    line: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    uri: str | None = None
    experiment: str = ""
    finish_timeout_s: float = 30.0

    @property
    def label(self) -> str:
        return self.LABELS[self.kind]


class Store(Protocol):
    """A place for metrics that an attempt has opened."""

    def write(self, row: dict[str, Any]) -> None:
        """Add a row of the record unless the store has it."""
        ...

    def flush(self) -> None:
        """Hand what was written to the disk or the server."""
        ...

    def close(self, exit_code: int) -> None:
        """End the store. `exit_code`: 0 for a run that did not fail."""
        ...


def open_store(job: StoreJob) -> Store:
    """Raises ImportError without the library, and whatever the library raises."""
    folder = RunFolder(Path(job.run_dir))
    if job.kind == "tensorboard":
        return TensorboardStore(folder.tensorboard / job.line)
    return MlflowStore(job.uri or default_uri(folder), job.experiment, job.name, job.line, job.config)


def default_uri(folder: RunFolder) -> str:
    """An sqlite file of the run's own."""
    return f"sqlite:///{folder.mlflow.resolve()}/mlflow.db"


def copy(job: StoreJob, orders: Iterator[int | None]) -> None:
    """Copy rows until an order to end comes, and then the rest."""
    store, rows = open_store(job), RecordFollower(RunFolder(Path(job.run_dir)).metrics)

    def send() -> None:
        for row in rows.poll():
            store.write(row)
        store.flush()

    for exit_code in orders:
        send()
        if exit_code is not None:
            store.close(exit_code)
            return


def _orders(orders: Orders) -> Iterator[int | None]:
    """None while the run lives, then its exit code."""
    while (line := orders.next(POLL_S)) is None:
        yield None
    yield json.loads(line)["close"] if line else 1


def main() -> int:
    # A stop signal reaches the whole process group. This process ends by its pipe, after the last row.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pipe = open(0, "rb", buffering=0)  # noqa: SIM115  held until the process ends
    first = pipe.readline()
    if not first:
        return 0
    job = StoreJob(**json.loads(first))
    orders = Orders(pipe, job.finish_timeout_s)
    try:
        home = Path(job.run_dir) / job.kind
        home.mkdir(exist_ok=True)
        with open(home / "lock", "w") as lock:
            # The copy of the attempt before may still send its last rows.
            fcntl.flock(lock, fcntl.LOCK_EX)
            copy(job, _orders(orders))
    except ImportError as error:
        warn(f"there is no copy ({one_line(error)}); pip install 'phalanx[{job.kind}]'", job.label)
        return UNUSABLE
    except Exception as error:
        warn(f"the copy ended ({type(error).__name__}: {one_line(error)})", job.label)
        return GAVE_UP
    return 0


if __name__ == "__main__":
    sys.exit(main())
