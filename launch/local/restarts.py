"""Starts a run on this machine again after a crash or a hang. In: a `LaunchPlan`, how often. Out: how the last attempt ended.

Bad input, divergence and a request to end are final: a restart would meet them again. A restart waits for a disk that is full or
refuses to write, within the bound of launch/disk_wait.py.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TextIO

from configs.errors import DiskError
from configs.launch_schema import Restart
from launch.disk_wait import wait_for_disk
from launch.local.next_agent import NextAgent
from launch.local.run import LocalRunResult, report, run_local
from launch.local.signals import SignalForwarder
from launch.plan import LaunchPlan
from pretrain.metrics.screen import screen_of
from pretrain.run.files import check_room
from pretrain.run.folder import EXIT_CODE, RunFolder

_HEALED = ("failed", "died", "hung")
# Attempts in a row without a new checkpoint after which the run itself is at fault.
_MOST_STUCK = 2


def run_with_restarts(
    plan: LaunchPlan, environ: Mapping[str, str], out: TextIO, err: TextIO, total_steps: int, restart: Restart
) -> LocalRunResult:
    """`run_local`, and again up to `restart.max_local` times. Raises ConfigError like run_local."""
    restarts, stuck, result = 0, 0, None
    next_agent = NextAgent(plan.argv, {**environ, **dict(plan.env)}, restart.standby_after_s if plan.shared_imports else None)
    # One for all attempts: a signal between two of them counts, too.
    signals = SignalForwarder(screen_of(err) or err)
    signals.install()
    try:
        while True:
            if restarts == restart.max_local:
                next_agent.after_s = None
            before = plan.folder.newest_checkpoint_step()
            try:
                result = run_local(plan, environ, out, total_steps, next_agent, signals)
            except DiskError as error:
                if result is None:
                    raise
                # After the wait, the disk has filled up again: this attempt ended before it began.
                print(error, file=err, flush=True)
            stuck = 0 if plan.folder.newest_checkpoint_step() > before else stuck + 1
            if result.state not in _HEALED or result.asked or restarts == restart.max_local:
                return result
            if stuck >= _MOST_STUCK:
                print(f"no restart: {stuck} attempts in a row ended without a new checkpoint", file=err, flush=True)
                return result
            restarts += 1
            print(report(result, plan.folder), file=err)
            if (asked := _wait_for_room(plan.folder, signals, err)) is not None:
                return replace(result, state=asked, exit_code=EXIT_CODE[asked], asked=asked) if asked else result
            print(f"restart {restarts} of at most {restart.max_local} (launch.restart.max_local)", file=err, flush=True)
    finally:
        next_agent.drop()
        signals.restore()


def _wait_for_room(folder: RunFolder, signals: SignalForwarder, err: TextIO) -> str | None:
    """Wait until the disk takes the first files of an attempt; None: it does.

    Otherwise the state that a signal asked for meanwhile, or an empty text where the patience ended.
    """

    def is_asked() -> bool:
        signals.deliver()
        return bool(signals.asked)

    def say(text: str) -> None:
        print(f"phalanx: {text}", file=err, flush=True)

    try:
        wait_for_disk(lambda: check_room(folder.path), "the next attempt", say, is_asked)
        return signals.asked if is_asked() else None
    except OSError as error:
        if not signals.asked:
            say(f"no restart: {error}; phalanx resume {folder.path} goes on from the newest whole checkpoint")
        return signals.asked
