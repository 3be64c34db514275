"""Starts a run on this machine again after a crash or a hang. In: a `LaunchPlan`, how often. Out: how the last attempt ended.

Bad input, divergence and a request to end are final: a restart would meet them again.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from launch.local.run import LocalRunResult, report, run_local
from launch.plan import LaunchPlan

_HEALED = ("failed", "died", "hung")
# Attempts in a row without a new checkpoint after which the run itself is at fault.
_MOST_STUCK = 2


def run_with_restarts(
    plan: LaunchPlan, environ: Mapping[str, str], out: TextIO, err: TextIO, total_steps: int, max_restarts: int
) -> LocalRunResult:
    """`run_local`, and again up to `max_restarts` times. Raises ConfigError like run_local."""
    restarts = stuck = 0
    while True:
        before = plan.folder.newest_checkpoint_step()
        result = run_local(plan, environ, out, err, total_steps)
        stuck = 0 if plan.folder.newest_checkpoint_step() > before else stuck + 1
        if result.state not in _HEALED or result.asked or restarts == max_restarts:
            return result
        if stuck >= _MOST_STUCK:
            print(f"no restart: {stuck} attempts in a row ended without a new checkpoint", file=err, flush=True)
            return result
        restarts += 1
        print(report(result, plan.folder), file=err)
        print(f"restart {restarts} of at most {max_restarts} (launch.restart.max_local)", file=err, flush=True)
