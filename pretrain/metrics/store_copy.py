"""The process that copies the record to TensorBoard's event files or to MLflow. In: a `StoreJob` as a JSON line on stdin.

It follows the growing metrics.jsonl in the frame of the copy to W&B (pretrain/metrics/copy_process.py). A store says on opening
which steps it has, so each step is there once, however many attempts a run has and whenever one is killed.

Torch-free.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pretrain.metrics.copy_process import POLL_S, Orders, exit_code_of, run_copy
from pretrain.metrics.mlflow_store import MlflowStore
from pretrain.metrics.tensorboard_store import TensorboardStore
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

    @property
    def remedy(self) -> str:
        return f"; pip install 'phalanx[{self.kind}]'"


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


def follow(job: StoreJob, orders: Orders) -> None:
    """Copy rows until rank 0 sends a line or is gone, and then the rest."""
    store, rows = open_store(job), RecordFollower(RunFolder(Path(job.run_dir)).metrics)

    def send() -> None:
        for row in rows.poll():
            store.write(row)
        store.flush()

    send()
    while (line := orders.next(POLL_S)) is None:
        send()
    send()
    store.close(exit_code_of(line))


def lock_of(job: StoreJob) -> Path:
    """The lock of the run's copies of this kind; the folder of their files is made."""
    home = Path(job.run_dir) / job.kind
    home.mkdir(exist_ok=True)
    return home / "lock"


def main() -> int:
    return run_copy(StoreJob, lock_of, follow)


if __name__ == "__main__":
    sys.exit(main())
