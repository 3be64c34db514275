"""The bill after the fact: what a run was planned to take, beside what it took. In: a run folder. Out: `Measured`.

Torch-free.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from launch.status import RunStatus, read_status, require_run_folder
from parallel.memory.hardware import HOST_NAME
from parallel.memory.job import make_job
from pretrain.data.tokenizer import vocab_size
from pretrain.metrics.goodput import attempt_seconds
from tools.planner.calibrate import machine_name, measured_memory_gib, read_config, read_rows, settled_step_s
from tools.planner.planning import Plan, make_plan
from tools.text_table import table

_HOUR_S = 3600.0


@dataclass(frozen=True)
class Measured:
    """A plan and the run that followed it. `rows`: name → (planned, measured); a value that was not measured is None."""

    status: RunStatus
    plan: Plan
    rows: dict[str, tuple[float, float | None]]

    def as_dict(self) -> dict[str, Any]:
        found = {
            name: {"planned": planned, "measured": value, "ratio": _ratio(planned, value)}
            for name, (planned, value) in self.rows.items()
        }
        return {"run_dir": self.status.run_dir, "state": self.status.state, "step": self.status.step} | found


def measure(run_dir: str) -> Measured:
    """The run's plan beside its record. Raises ConfigError with what is missing.

    Step time: the median without the first steps. Memory: the fullest stage's peak, GiB. GPU-hours: those of the steps that
    count in the plan; measured, those of the attempts, with start-up, saves and lost steps, without the queue.
    """
    folder = require_run_folder(run_dir)
    config = read_config(folder.path)
    rows = read_rows(folder.metrics)
    job = make_job(config, vocab_size(config))
    plan = make_plan(job)
    status = read_status(folder, time.time(), ask_slurm=lambda life: False, is_whole=True)
    step_s = settled_step_s(rows)
    world, price = job.layout.world_size, job.machine.price_per_gpu_hour_usd
    # The record of a CPU run has the memory of the whole process in it.
    memory = None if machine_name(config) == HOST_NAME else measured_memory_gib(rows)
    speed = plan.tokens_per_s_per_gpu * plan.timing.step_s / step_s
    hours = plan.timing.step_s * status.step / _HOUR_S * world
    spent = None if status.goodput is None else attempt_seconds(status.goodput) / _HOUR_S * world
    found: dict[str, tuple[float, float | None]] = {
        "step_s": (plan.timing.step_s, step_s),
        "tokens_per_s_per_gpu": (plan.tokens_per_s_per_gpu, speed),
        "mfu": (plan.mfu, plan.mfu * plan.timing.step_s / step_s),
        "memory_gib": (max(rank.allocated_gib for rank in plan.ledger.ranks), memory),
        "gpu_hours": (hours, spent),
    }
    if price:
        found["cost_usd"] = (hours * price, None if spent is None else spent * price)
    return Measured(status, plan, found)


def _ratio(planned: float, measured: float | None) -> float | None:
    """None: not measured, or no step is known of a damaged record."""
    return measured / planned if measured is not None and planned else None


def measured_text(found: Measured) -> str:
    """The table for people."""
    rows = [
        [name.replace("_", " "), f"{planned:,.4g}", "-" if value is None else f"{value:,.4g}",
         "-" if (ratio := _ratio(planned, value)) is None else f"x{ratio:.3g}"]
        for name, (planned, value) in found.rows.items()
    ]  # fmt: skip
    status = found.status
    head = f"{status.run_dir}: {status.state}, step {status.step}, on {found.plan.job.layout.world_size} x "
    return f"{head}{found.plan.job.machine.gpu.name}\n{table(('', 'planned', 'measured', 'ratio'), rows)}"
