"""What has to hold before a run is started, by `launch`, `resume`, or as a part of a ladder. In: a config. Out: the verdict.

Torch-free.
"""

from __future__ import annotations

import os

from configs.errors import ConfigError
from configs.schema import Config
from launch.plan import check_local
from launch.slurm.submit import check_slurm
from parallel.batch import steps_of
from parallel.legality.verdict import check_config
from pretrain.preflight.verdict import Preflight, preflight
from pretrain.run.decision import pending_step
from pretrain.run.folder import folder_of


def finished_at(config: Config) -> int | None:
    """The last step of a legal config if its run has reached that step, otherwise None."""
    folder = folder_of(config)
    done = folder.done_step()
    if done is None or check_config(config).problems or pending_step(folder, config.checkpoint.resume_step) is not None:
        return None
    return stop_step if done >= (stop_step := steps_of(config)) else None


def check_start(config: Config, with_data: bool, dry_run: bool = False) -> Preflight:
    """The verdict on a start. Raises ConfigError with every problem. A dry run starts nothing in this environment."""
    found = preflight(config, with_data and not dry_run)
    if config.launch.target == "slurm":
        target_problems = check_slurm(config)
    else:
        target_problems = [] if dry_run else check_local(config, os.environ)
    if problems := [*found.problems, *target_problems]:
        raise ConfigError(problems)
    return found
