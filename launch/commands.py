"""The commands launch, status, logs, cancel and resume. In: the words after `phalanx`. Out: an exit code.

Exit codes: 0 the run finished or the command answered, 1 the run broke, 2 the input is bad, 3 the run diverged, 75 the run
was preempted and can be started again, 130 the run was stopped.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.errors import ConfigError, Problem
from configs.load import Loaded
from configs.schema import Config
from launch.cancel import cancel
from launch.local.run import LocalRunResult
from launch.logs import print_all_logs, print_rank_log
from launch.plan import LaunchPlan, make_plan, manual_start_text, torchrun_line
from launch.run_list import list_runs
from launch.slurm.submit import as_json as submit_json
from launch.slurm.submit import describe as describe_submitted
from launch.slurm.submit import environment_notes, script_of, submit
from launch.start import check_start, finished_at, start_here
from launch.status import as_json, read_status, require_run_folder
from launch.status_text import describe, table
from launch.status_watch import terminal_columns, watch
from pretrain.preflight.verdict import load_to_start
from pretrain.run.folder import RunFolder, finished_text, folder_of
from pretrain.run.lock import live_holder

WATCH_S = 2.0
CANCEL_WAIT_S = 60.0
RUNS = Path("runs")
NO_RUNS = f"no runs in {RUNS}/; phalanx status RUN_DIR names another place"


def main(argv: list[str]) -> int:
    """Run the command that `argv[0]` names and return its exit code. Raises ConfigError if the input is bad."""
    command, *words = argv
    commands = {"launch": _launch, "resume": _resume, "status": _status, "logs": _logs, "cancel": _cancel}
    return commands[command](words)


def _launch(words: list[str]) -> int:
    parser = _parser(
        "launch",
        "Start a run or a ladder: here, waiting until it ends (launch.target=local), or as a Slurm job (launch.target=slurm)",
    )
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of a shipped one")
    _add_start_options(parser)
    found = parser.parse_intermixed_args(words)
    return _start(found.config, found.overrides, found)


def _resume(words: list[str]) -> int:
    parser = _parser("resume", "Continue a run from its newest checkpoint, with the config of its last attempt")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run folder")
    _add_start_options(parser)
    found = parser.parse_intermixed_args(words)
    folder = require_run_folder(found.run_dir)
    if not folder.config.exists():
        rule = "a run is resumed with the config of its last attempt; no attempt has begun here"
        raise ConfigError(Problem("RUN_DIR", found.run_dir, rule, "phalanx launch CONFIG starts it"))
    return _start(str(folder.config), [*found.overrides, f"run.dir={found.run_dir}"], found)


def _start(source: str, overrides: Sequence[str], options: argparse.Namespace) -> int:
    loaded = load_to_start(source, overrides, not (options.no_data or options.dry_run))
    config, folder = loaded.config, folder_of(loaded.config)
    if not options.dry_run and (stop_step := finished_at(config)) is not None:
        text = finished_text(folder, stop_step)
        print(json.dumps({"run_dir": str(folder.path), "state": "finished", "exit_code": 0}) if options.json else text)
        return 0
    found = check_start(config, not options.no_data, options.dry_run)
    for notice in found.notices:
        print(f"note: {notice.path}: {notice.text}", file=sys.stderr)
    if found.resume is not None and found.resume.set_aside:
        print(f"note: checkpoint.resume_step: {found.resume.describe()}", file=sys.stderr)
    if config.launch.target == "slurm":
        return _start_slurm(loaded, options)
    return _start_local(config, source, overrides, options)


def _start_slurm(loaded: Loaded, options: argparse.Namespace) -> int:
    folder = folder_of(loaded.config)
    if options.dry_run:
        text = script_of(loaded.config, Path.cwd())
        files = "the script needs the files that phalanx launch writes beside it; sbatch of this output alone ends at once"
        for note in (*environment_notes(loaded.config, os.environ), files):
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps({"script": text, "run_dir": str(folder.path)}, indent=2) if options.json else text, end="")
        return 0
    submitted = submit(loaded, Path.cwd())
    print(submit_json(submitted, folder) if options.json else describe_submitted(submitted, folder))
    return 0


def _start_local(config: Config, source: str, overrides: Sequence[str], options: argparse.Namespace) -> int:
    plan = make_plan(config, source, overrides, os.environ)
    if options.dry_run:
        _print_plan(plan, options.json)
        return 0
    out = sys.stderr if options.json else sys.stdout
    result = start_here(plan, config, out)
    if options.json:
        print(_result_json(result, plan.folder))
    return result.exit_code


def _print_plan(plan: LaunchPlan, as_document: bool) -> None:
    if as_document:
        document = {"command": plan.argv, "env": dict(plan.env), "line": torchrun_line(plan), "run_dir": str(plan.folder.path)}
        print(json.dumps(document, indent=2))
    else:
        print(torchrun_line(plan) if plan.nodes == 1 else manual_start_text(plan))


def _result_json(result: LocalRunResult, folder: RunFolder) -> str:
    outcome = folder.read_outcome()
    ended = outcome.as_dict() if outcome is not None and outcome.attempt == result.attempt else None
    first = result.failures[0] if result.failures else None
    document = {
        "run_dir": str(folder.path),
        "attempt": result.attempt,
        "state": result.state,
        "exit_code": result.exit_code,
        "outcome": ended,
        "first_failure": {"rank": first.rank, "kind": first.kind, "text": first.text} if first else None,
        "logs": str(result.log_dir),
    }
    return json.dumps(document, indent=2)


def _status(words: list[str]) -> int:
    parser = _parser("status", "State, progress and goodput of a run or a ladder, from the run folder's files and Slurm's queue")
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        nargs="?",
        help="the run folder, or a ladder's file or folder; without RUN_DIR: a line for each run in runs/",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--watch", action="store_true", help=f"show it again every {WATCH_S:g} s, until the run is over")
    found = parser.parse_args(words)
    folder = require_run_folder(found.run_dir) if found.run_dir is not None else None

    def look(columns: int | None) -> tuple[str, bool]:
        """(the text, whether it may still change)."""
        if folder is not None:
            status = read_status(folder, is_whole=True)
            return as_json(status) if found.json else describe(status), status.live
        runs = list_runs(RUNS)
        if found.json:
            text = as_json(runs)
        else:
            text = "\n".join(table(runs, columns) if runs else [NO_RUNS])
        return text, any(status.live for status in runs)

    if found.watch:
        watch(look, WATCH_S, sys.stdout, redraw=not found.json)
    else:
        print(look(terminal_columns(sys.stdout))[0])
    return 0


def _logs(words: list[str]) -> int:
    parser = _parser("logs", "Print a run's logs: the first failure, then the log of rank 0")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run folder")
    parser.add_argument(
        "--rank",
        type=_rank,
        default=0,
        metavar="N",
        help="the rank whose log is printed (default 0); all: the logs of every rank, merged",
    )
    parser.add_argument(
        "--attempt", type=int, default=None, metavar="N", help="the attempt whose logs are printed (default: the newest)"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="keep printing while the run is live")
    found = parser.parse_args(words)
    if found.rank is None and found.follow:
        parser.error("--follow shows the log of one rank: name it by --rank N, or leave --follow out")
    folder = require_run_folder(found.run_dir)
    if found.rank is None:
        print_all_logs(folder, found.attempt, sys.stdout)
    else:
        print_rank_log(folder, found.rank, found.attempt, found.follow, sys.stdout, sys.stderr)
    return 0


def _rank(text: str) -> int | None:
    """The number of a rank, or None for all ranks. Raises ValueError if `text` is neither a number nor `all`."""
    return None if text == "all" else int(text)


def _cancel(words: list[str]) -> int:
    parser = _parser("cancel", "Ask a live run to finish its step, save and stop")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run folder")
    parser.add_argument(
        "--wait",
        type=float,
        default=CANCEL_WAIT_S,
        metavar="S",
        help=f"longest wait for the run to end, in seconds (default {CANCEL_WAIT_S:g})",
    )
    parser.add_argument("--now", action="store_true", help="end a Slurm job by scancel, whether it has saved or not")
    found = parser.parse_args(words)
    folder = require_run_folder(found.run_dir)
    print(cancel(folder, found.wait, found.now))
    return 0 if live_holder(folder) is None else 1


def _parser(command: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"phalanx {command}", description=text + ".")


def _add_start_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config values that win over the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the exact command or batch script; start nothing")
    parser.add_argument("--no-data", action="store_true", help="don't look for the data's files: they are elsewhere")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout at the end")
