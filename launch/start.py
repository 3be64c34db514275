"""The start of a run, by `launch`, `resume`, or as part of a ladder. In: a config. Out: the verdict on it, or how the run ended.

Torch-free.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from configs.errors import ConfigError
from configs.schema import Config
from launch.local.restarts import run_with_restarts
from launch.local.run import LocalRunResult, report
from launch.plan import LaunchPlan, check_local
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


def start_here(plan: LaunchPlan, config: Config, out: TextIO) -> LocalRunResult:
    """Run a plan of a config on this machine to its end, with the restarts that the config allows. How it broke goes to stderr.

    `out`: the stream that shows the run while it trains. Raises ConfigError like run_local.
    """
    result = run_with_restarts(plan, os.environ, out, sys.stderr, steps_of(config), config.launch.restart)
    if text := report(result, plan.folder):
        print(text, file=sys.stderr)
    return result


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
