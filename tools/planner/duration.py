"""From a step to a run: days, GPU-hours, cost, checkpoint traffic, and what failures take.

In: config, job, step time. Out: a `RunEstimate`. Young's interval sqrt(2·save·MTBF) (1974), with Daly's correction (2006);
goodput = share of the time in which steps are made that are kept.

Torch-free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import Config
from parallel.batch import consumed_seqs_after, steps_of
from parallel.memory.hardware import GIB
from parallel.memory.job import PlannedJob
from pretrain.preflight.disk_space import checkpoint_bytes

# 419 unexpected interruptions in 54 days on 16,384 H100 (Llama 3, arXiv 2407.21783, table 5).
GPU_MTBF_HOURS = 16384 * 54 * 24 / 419
RESTART_S = 600.0
# What one GPU writes to shared storage, GB/s, when nobody says better; and how many GPUs' worth the storage takes at most.
WRITE_GB_S, STORAGE_GB_S = 1.0, 100.0


@dataclass(frozen=True)
class Failures:
    """How often one GPU stops a run, how long a restart takes, and how long a save stalls it (None: from its bytes)."""

    gpu_mtbf_hours: float = GPU_MTBF_HOURS
    restart_s: float = RESTART_S
    save_s: float | None = None


@dataclass(frozen=True)
class RunEstimate:
    """A whole run. `days` is without failures; `days_with_failures` with saves, restarts and lost steps. `gpu_hours` and
    `cost_usd` hold those of spare nodes too.
    """

    steps: int
    tokens: int
    days: float
    gpu_hours: float
    cost_usd: float | None
    checkpoint_gib: float
    save_s: float
    interval_s: float
    interval_steps: int
    mtbf_hours: float
    goodput: float

    def as_dict(self) -> dict[str, object]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "days": round(self.days, 4),
            "gpu_hours": round(self.gpu_hours, 2),
            "cost_usd": None if self.cost_usd is None else round(self.cost_usd, 2),
            "checkpoint_gib": round(self.checkpoint_gib, 3),
            "save_s": round(self.save_s, 3),
            "checkpoint_interval_s": round(self.interval_s, 1),
            "checkpoint_interval_steps": self.interval_steps,
            "mtbf_hours": round(self.mtbf_hours, 3),
            "goodput": round(self.goodput, 4),
            "days_with_failures": round(self.days / self.goodput, 4),
        }


def interval_s(save_s: float, mtbf_s: float) -> float:
    """Daly's interval between saves: sqrt(2·save·M)·(1 + x/3 + x²/9) - save with x = sqrt(save / 2M), M at most."""
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(save_s / (2 * mtbf_s))
    return max(math.sqrt(2 * save_s * mtbf_s) * (1 + x / 3 + x * x / 9) - save_s, save_s)


def goodput(save_s: float, every_s: float, mtbf_s: float, restart_s: float) -> float:
    """Kept work over time: saves every so often, and per failure a restart and half an interval lost."""
    return 1.0 / ((1 + save_s / every_s) * (1 + (restart_s + every_s / 2) / mtbf_s))


def estimate_run(config: Config, job: PlannedJob, step_s: float, failures: Failures) -> RunEstimate:
    """The run of a legal config. A batch ramp counts by its tokens: smaller steps are taken as proportionally shorter."""
    steps, world = steps_of(config), job.layout.world_size
    tokens = consumed_seqs_after(config.batch, steps) * job.seq_length
    total_s = tokens / job.step_tokens * step_s
    spare = config.launch.slurm.spare_nodes * config.launch.processes_per_node if config.launch.target == "slurm" else 0
    gpu_hours = total_s / 3600 * (world + spare)
    price = job.machine.price_per_gpu_hour_usd
    size = checkpoint_bytes(config, job.vocab)
    save_s = failures.save_s if failures.save_s is not None else size / 1e9 / min(WRITE_GB_S * world, STORAGE_GB_S)
    mtbf_s = failures.gpu_mtbf_hours * 3600 / world
    every_s = interval_s(save_s, mtbf_s)
    return RunEstimate(
        steps=steps,
        tokens=tokens,
        days=total_s / 86400,
        gpu_hours=gpu_hours,
        cost_usd=None if price is None else gpu_hours * price,
        checkpoint_gib=size / GIB,
        save_s=save_s,
        interval_s=every_s,
        interval_steps=max(1, round(every_s / step_s)),
        mtbf_hours=mtbf_s / 3600,
        goodput=goodput(save_s, every_s, mtbf_s, failures.restart_s),
    )
