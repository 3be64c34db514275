"""`phalanx wandb RUN_DIR`: send W&B the steps of the record that it lacks. In: a run folder. Out: what W&B has then.

The rows go through the same copying process as those of a run (pretrain/metrics/wandb_copy.py), into the same W&B run, each step
once. Without an API key they go to an offline file. Exit codes: 0 nothing is lacking, 1 steps are still lacking, 2 bad input.

Torch-free.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace

from configs.errors import ConfigError, Problem
from configs.load import load_config
from configs.schema import Config
from launch.status import require_run_folder
from pretrain.metrics.copy_process import TOO_LONG
from pretrain.metrics.wandb_copy import CopyJob
from pretrain.metrics.wandb_sink import make_copy_job, start_copy, tell
from pretrain.metrics.wandb_steps import CopyState, copy_lock, read_copy_state
from pretrain.run.files import last_row, storage_problem
from pretrain.run.folder import RunFolder
from pretrain.run.lock import live_holder

TIMEOUT_S = 600.0
# The copying process ends itself at the time limit. It is killed so many seconds later.
_KILL_AFTER_S = 5.0


def main(argv: list[str]) -> int:
    """Run the command and return its exit code. Raises ConfigError if the input is bad."""
    found = _parser().parse_intermixed_args(argv)
    folder = require_run_folder(found.run_dir)
    if not folder.config.exists():
        rule = "a run's rows are sent with the config of its last attempt; no attempt has begun here"
        raise ConfigError(Problem("RUN_DIR", found.run_dir, rule, "phalanx launch CONFIG starts it"))
    config = load_config(str(folder.config), found.overrides).config
    try:
        job = replace(_job(config, folder), finish_timeout_s=found.timeout, falls_back=False)
        last_step = _last_step(folder)
        before = _state(folder, job, last_step)
        code = 0 if found.dry_run or not last_step else _send(job, folder, found.timeout)
        after = _state(folder, job, last_step)
    except OSError as error:
        raise ConfigError(storage_problem("RUN_DIR", folder.path, error)) from error
    is_whole = after.lacking_steps == (after.in_files_steps if job.mode == "offline" else 0)
    if found.json:
        document = {"run_dir": str(folder.path), "steps": last_step, "lacking_before_steps": before.lacking_steps}
        print(json.dumps(document | after.as_dict(), indent=2))
    else:
        print(_text(job, last_step, before, after, found.dry_run))
    if code == TOO_LONG:
        print(f"phalanx wandb: not everything was sent within --timeout {found.timeout:g} s", file=sys.stderr)
    return 0 if found.dry_run or (code == 0 and is_whole) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phalanx wandb", description="Send W&B the steps that it lacks of a run's record.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run folder")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="config values that win over the run's, e.g. metrics.wandb.mode=online"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent; send nothing")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S", help=f"longest time to send, in seconds (default {TIMEOUT_S:g})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _job(config: Config, folder: RunFolder) -> CopyJob:
    """Raises ConfigError if W&B is off, if no attempt has begun, if the run lives, or if another process sends its rows."""
    if not folder.wandb_id.exists():
        rule = "the file wandb_id names the W&B run of all attempts; this folder has none"
        raise ConfigError(Problem("RUN_DIR", str(folder.path), rule, "put the run's own there, or resume the run: it makes one"))
    wandb_id = folder.wandb_id.read_text(errors="replace").strip()
    job = make_copy_job(config, folder, wandb_id, os.environ)
    if job is None:
        off = "wandb" not in config.metrics.sinks
        key, got = ("metrics.sinks", config.metrics.sinks) if off else ("metrics.wandb.mode", "disabled")
        raise ConfigError(Problem(key, got, "this run has no copy in W&B", "name W&B behind RUN_DIR: " + _ON[off]))
    if (holder := live_holder(folder)) is not None:
        rule = f"while a run trains, its own copy sends the rows; it is held by {holder.describe()}"
        raise ConfigError(Problem("RUN_DIR", str(folder.path), rule, "wait for its end"))
    if _is_sending(folder):
        rule = "one process at a time sends the rows of a run; another one does it now"
        raise ConfigError(Problem("RUN_DIR", str(folder.path), rule, "wait for its end"))
    return job


def _is_sending(folder: RunFolder) -> bool:
    if not copy_lock(folder).exists():
        return False
    with open(copy_lock(folder)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


_ON = {True: "metrics.sinks='[console, jsonl, wandb]'", False: "metrics.wandb.mode=online"}


def _last_step(folder: RunFolder) -> int:
    step = (last_row(folder.metrics) or {}).get("step")
    return step if isinstance(step, int) else 0


def _state(folder: RunFolder, job: CopyJob, last_step: int) -> CopyState:
    found = read_copy_state(folder, last_step, is_live=False)
    return CopyState(job.wandb_id, job.mode, last_step, 0) if found is None else replace(found, mode=job.mode)


def _send(job: CopyJob, folder: RunFolder, timeout_s: float) -> int:
    """Run a copying process to its end. Returns its exit code."""
    folder.wandb.mkdir(exist_ok=True)
    outcome = folder.read_outcome()
    broke = outcome is None or outcome.state in ("failed", "diverged")
    process = start_copy(job, os.environ)
    tell(process, {"close": 1 if broke else 0})
    try:
        return process.wait(timeout_s + _KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return TOO_LONG


def _text(job: CopyJob, last_step: int, before: CopyState, after: CopyState, is_dry: bool) -> str:
    run = f"W&B run {after.wandb_id} of project {job.project}"
    if not last_step:
        return "the record has no steps yet"
    if is_dry:
        what = "an offline file" if job.mode == "offline" else run
        left = before.lacking_steps - (before.in_files_steps if job.mode == "offline" else 0)
        return f"would send {left} of {last_step} steps to {what}"
    if job.mode == "offline":
        return f"offline files have {after.in_files_steps} of {last_step} steps; with an API key, this command sends them"
    if after.lacking_steps:
        return f"{run} lacks {after.lacking_steps} of {last_step} steps"
    return f"{run} has all {last_step} steps"
