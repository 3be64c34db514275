"""Starts a run on this machine again after a crash or a hang. In: a `LaunchPlan`, how often. Out: how the last attempt ended.

Bad input, divergence and a request to end are final: a restart would meet them again.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from configs.launch_schema import Restart
from launch.local.next_agent import NextAgent
from launch.local.run import LocalRunResult, report, run_local
from launch.plan import LaunchPlan

_HEALED = ("failed", "died", "hung")
# Attempts in a row without a new checkpoint after which the run itself is at fault.
_MOST_STUCK = 2


def run_with_restarts(
    plan: LaunchPlan, environ: Mapping[str, str], out: TextIO, err: TextIO, total_steps: int, restart: Restart
) -> LocalRunResult:
    """`run_local`, and again up to `restart.max_local` times. Raises ConfigError like run_local."""
    restarts = stuck = 0
    next_agent = NextAgent(plan.argv, {**environ, **dict(plan.env)}, restart.standby_after_s if plan.shared_imports else None)
    try:
        while True:
            if restarts == restart.max_local:
                next_agent.after_s = None
            before = plan.folder.newest_checkpoint_step()
            result = run_local(plan, environ, out, err, total_steps, next_agent)
            stuck = 0 if plan.folder.newest_checkpoint_step() > before else stuck + 1
            if result.state not in _HEALED or result.asked or restarts == restart.max_local:
                return result
            if stuck >= _MOST_STUCK:
                print(f"no restart: {stuck} attempts in a row ended without a new checkpoint", file=err, flush=True)
                return result
            restarts += 1
            print(report(result, plan.folder), file=err)
            print(f"restart {restarts} of at most {restart.max_local} (launch.restart.max_local)", file=err, flush=True)
    finally:
        next_agent.drop()
