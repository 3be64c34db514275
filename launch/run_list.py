"""The runs of a folder. In: a folder such as runs/. Out: a `RunStatus` for each run, also where a run's folder can't be read.

Torch-free.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from configs.errors import ConfigError, Problem
from launch.slurm.lifecycle import OVER
from launch.status import RunStatus, last_sign_s, read_status
from pretrain.run.files import storage_problem
from pretrain.run.folder import RunFolder, has_begun


def list_runs(parent: Path) -> list[RunStatus]:
    """The runs whose folders lie in `parent`, the one with the newest sign of life first. Folders of other tools are left out.

    Slurm is asked for jobs that may still be there, and no further once it did not answer. Raises ConfigError if `parent`
    can't be read.
    """
    try:
        names = sorted(os.listdir(parent)) if parent.is_dir() else []
    except OSError as error:
        raise ConfigError(storage_problem("RUN_DIR", parent, error)) from error
    found: list[RunStatus] = []
    slurm_answers = True
    for name in names:
        status = _status_of(RunFolder(parent / name), slurm_answers)
        if status is not None:
            found.append(status)
            slurm_answers = slurm_answers and not (status.job or {}).get("unknown", "").startswith("Slurm does not answer")
    return sorted(found, key=lambda status: status.age_s if status.age_s is not None else float("inf"))


def _status_of(folder: RunFolder, slurm_answers: bool) -> RunStatus | None:
    """The status of a run. None: nothing of a run is there."""
    try:
        if not folder.path.is_dir() or not has_begun(folder):
            return None
        return read_status(folder, ask_slurm=lambda life: slurm_answers and life.phase != OVER)
    except OSError as error:
        return _unreadable(folder, storage_problem("RUN_DIR", folder.path, error))
    except ConfigError as error:
        return _unreadable(folder, error.problems[0])


def _unreadable(folder: RunFolder, problem: Problem) -> RunStatus:
    last_s = last_sign_s(folder)
    age_s = None if last_s is None else max(0.0, time.time() - last_s)
    return RunStatus(str(folder.path), "unreadable", problem.rule, age_s=age_s)
