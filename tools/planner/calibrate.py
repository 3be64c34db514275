"""A measured run as the measure of the user's machine: `phalanx plan CONFIG --calibrate RUN_DIR`.

In: a run folder (config.yaml, metrics.jsonl). Out: a `Calibration`: its median step time over the predicted one, and its
peak memory over the predicted, which later plans for the same kind of machine are scaled by. A run on CPUs has no peak
memory of torch's allocator: its memory is left as predicted.

Torch-free.
"""

from __future__ import annotations

from itertools import islice
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import from_yaml_text
from configs.schema import Config
from launch.folder_files import check_files
from parallel.memory.hardware import HOST_NAME, make_machine
from parallel.memory.job import make_job
from pretrain.data.tokenizer import vocab_size
from pretrain.run.folder import RunFolder
from pretrain.run.record_rows import rows_from_end
from tools.planner.planning import Calibration, make_plan

# First steps load kernels and fill caches.
WARMUP_STEPS = 5
# A median of so many steps is settled, and a record of gigabytes need not be read for it.
MOST_ROWS = 10_000


def _refuse(path: str, got: object, rule: str, fix: str) -> ConfigError:
    return ConfigError(Problem(path, got, rule, fix))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The newest MOST_ROWS rows of a record that hold a step time, oldest first. Raises ConfigError."""
    try:
        timed = (row for row in rows_from_end(path) if _is_time(row.get("step_time_s")))
        rows = list(islice(timed, MOST_ROWS))[::-1]
    except OSError as error:
        raise _refuse(
            str(path), str(error), "a measured run has a readable record", "name the folder of a run that ran"
        ) from error
    if not rows:
        raise _refuse(str(path), "no step times", "a calibration needs measured steps", "let the run make some steps first")
    return rows


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < inf


def read_config(folder: Path) -> Config:
    """The resolved config of a run folder. Raises ConfigError."""
    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refuse(str(path), str(error), "a run folder holds its config", "name the folder of a run that ran") from error
    return from_yaml_text(text, str(path))


def settled_step_s(rows: list[dict[str, Any]]) -> float:
    """The median step time without the first steps, in seconds."""
    return median(float(row["step_time_s"]) for row in rows[WARMUP_STEPS:] or rows)


def measured_memory_gib(rows: list[dict[str, Any]]) -> float | None:
    """The fullest stage's peak over the record, None where it isn't there."""
    values = [float(value) for row in rows for name, value in row.items()
              if name.startswith("memory_gib/") and isinstance(value, (int, float))]  # fmt: skip
    return max(values, default=None)


def machine_name(config: Config) -> str:
    """The GPU's name in the planner's table, whatever alias the config has. Raises ConfigError when it isn't there."""
    return make_machine(config).gpu.name


def calibrate(run_dir: str, planned: Config) -> Calibration:
    """The machine of a run over ours, for plans on the same; of a folder of runs, the medians. Raises ConfigError."""
    folder = Path(run_dir)
    runs = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if (folder / "config.yaml").exists() or not runs:
        return _calibrate(folder, planned)
    found, problems = [], []
    for run in runs:
        try:
            found.append(_calibrate(run, planned))
        except ConfigError as error:
            problems += error.problems
    if not found:
        raise ConfigError(problems)
    source = f"{len(found)} of {len(runs)} runs in {folder}"
    return Calibration(median(one.time_scale for one in found), median(one.memory_scale for one in found), source)


def _calibrate(folder: Path, planned: Config) -> Calibration:
    if problems := check_files(RunFolder(folder)):
        raise ConfigError(problems)
    config = read_config(folder)
    ran, wanted = machine_name(config), machine_name(planned)
    if ran != wanted:
        rule = f"a run on {ran} doesn't say how fast {wanted} is"
        raise _refuse("cluster.gpu", planned.cluster.gpu, rule, "calibrate by a run on the same kind of machine")
    rows = read_rows(folder / "metrics.jsonl")
    job = make_job(config, vocab_size(config))
    plan = make_plan(job)
    # Without a GPU the record's memory is the whole process's, the interpreter and its libraries in it.
    memory = None if ran == HOST_NAME else measured_memory_gib(rows)
    predicted = max(rank.allocated_gib for rank in plan.ledger.ranks)
    return Calibration(
        time_scale=settled_step_s(rows) / plan.timing.step_s,
        memory_scale=memory / predicted if memory else 1.0,
        source=str(folder),
    )
