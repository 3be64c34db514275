"""The part of the config that the batch step needs, as JSON in the job's folder.

The batch step cannot load the config itself, because the Python of a compute node may lack OmegaConf.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config
from launch.slurm.lifecycle import RequeuePolicy
from launch.watch.heartbeats import WatchPolicy, make_watch_policy
from pretrain.run.files import read_json, write_json

JOB_NAME, SCRIPT_NAME, CONFIG_NAME = "job.json", "batch.sh", "config.yaml"
# Words of the batch script's command that the batch step replaces, and the last two that the node agent replaces.
PLACEHOLDERS = (
    "{nodes}",
    "{node_file}",
    "{attempt}",
    "{attempt_dir}",
    "{log_dir}",
    "{host}",
    "{port}",
    "{is_host}",
    "{local_addr}",
)


@dataclass(frozen=True)
class JobFile:
    """`sizes` are the numbers of nodes that the run may use, ascending; the last is launch.nodes.

    `stop_step` counts optimizer steps. `stop_before_s`, `master_port`, `resume_step` and `in_place` are
    launch.slurm.stop_before_s, launch.master_port, checkpoint.resume_step and launch.restart.in_place. `standby_after_s` is
    launch.restart.standby_after_s; None too where no attempt could use a standby.
    """

    run_dir: str
    sizes: tuple[int, ...]
    stop_step: int
    stop_before_s: float
    policy: RequeuePolicy
    watch: WatchPolicy
    resume_step: int | None = None
    master_port: int | None = None
    in_place: bool = False
    standby_after_s: float | None = None

    def write(self, job_dir: Path) -> None:
        value: dict[str, Any] = {
            "run_dir": self.run_dir,
            "sizes": list(self.sizes),
            "stop_step": self.stop_step,
            "stop_before_s": self.stop_before_s,
            "policy": asdict(self.policy),
            "watch": self.watch.to_json(),
            "resume_step": self.resume_step,
            "master_port": self.master_port,
            "in_place": self.in_place,
            "standby_after_s": self.standby_after_s,
        }
        write_json(job_dir / JOB_NAME, value)

    @staticmethod
    def read(job_dir: Path) -> JobFile:
        """Raises FileNotFoundError if the job's folder was moved or removed while the job waited."""
        value = read_json(job_dir / JOB_NAME)
        if value is None:
            raise FileNotFoundError(f"{job_dir / JOB_NAME}: not there, or not JSON; submit again with phalanx launch")
        return JobFile(
            value["run_dir"],
            tuple(value["sizes"]),
            value["stop_step"],
            value["stop_before_s"],
            RequeuePolicy(**value["policy"]),
            WatchPolicy.from_json(value["watch"]),
            value.get("resume_step"),
            value.get("master_port"),
            value.get("in_place", False),
            value.get("standby_after_s"),
        )


def make_job_file(config: Config, run_dir: Path, stop_step: int, sizes: Sequence[int]) -> JobFile:
    """The settings of a job. `run_dir` must be absolute, because the batch step may start in any folder."""
    slurm = config.launch.slurm
    policy = RequeuePolicy(slurm.requeue, slurm.max_attempts, slurm.max_without_progress, slurm.exclude_after_failures)
    watch, resume_step, port = make_watch_policy(config), config.checkpoint.resume_step, config.launch.master_port
    in_place = config.launch.restart.in_place
    after_s = config.launch.restart.standby_after_s if in_place and config.launch.shared_imports else None
    return JobFile(
        str(run_dir), tuple(sizes), stop_step, slurm.stop_before_s, policy, watch, resume_step, port, in_place, after_s
    )
