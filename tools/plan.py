"""`phalanx plan` and `phalanx plan-validate`: what a run will take, before anything is queued.

In: a config's name and key=value words, or published rows. Out: memory, time, cost and the best layouts, as text or JSON.
Exit 0, also when a plan does not fit (`fits` says so); 2 when the input is bad.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem, json_value
from configs.load import Loaded, load_config
from configs.schema import Config
from parallel.legality.verdict import check_config
from parallel.memory.hardware import HOST_NAME, make_machine
from parallel.memory.job import make_job
from parallel.memory.ledger import AT_RISK
from pretrain.data.tokenizer import vocab_size
from pretrain.preflight.memory import at_risk_text
from tools.planner import report
from tools.planner.advice import describe_change, explain, what_would_fit
from tools.planner.calibrate import calibrate
from tools.planner.candidates import robust_first
from tools.planner.duration import GPU_MTBF_HOURS, RESTART_S, Failures, estimate_run
from tools.planner.foreign import FOREIGN_ENGINES, as_engine, foreign_config, foreign_mark, foreign_note
from tools.planner.legal import ONLY_FOR_PLANS, plan_problems
from tools.planner.measured import measure, measured_text
from tools.planner.planning import UNCALIBRATED, Calibration, Plan, make_plan, model_dict, savings
from tools.planner.published.validate import validate
from tools.planner.risk import risk_of
from tools.planner.search import search
from tools.report.page import plotly_script
from tools.report.plan_pages import write_plan_page, write_search_page


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phalanx plan",
        description="Memory, time, MFU, days and cost of a config or a ladder; with --search the best layouts for its GPUs.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config values that win over the file's")
    parser.add_argument("--search", action="store_true", help="find the best layouts; the config's own degrees are ignored")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="layouts that --search shows (default 10)")
    words = "scale by this measured run of the same kind of machine, or by the median of the runs in this folder"
    parser.add_argument(
        "--robust",
        action="store_true",
        help="order ties by how little they split a token's computation, then by expert traffic on the network",
    )
    parser.add_argument(
        "--engine",
        choices=FOREIGN_ENGINES,
        help="plan the layout or the search as this engine would run it; Phalanx can't run the result",
    )
    parser.add_argument("--calibrate", metavar="RUN_DIR", help=words)
    parser.add_argument("--measured", action="store_true", help="CONFIG is a run folder: the plan beside what was measured")
    parser.add_argument(
        "--gpu-mtbf-hours", type=_positive, default=GPU_MTBF_HOURS, help="hours between failures of one GPU (default: Llama 3's)"
    )
    parser.add_argument(
        "--restart-s", type=_positive, default=RESTART_S, help=f"seconds from a failure until steps go on (default {RESTART_S:g})"
    )
    parser.add_argument("--save-s", type=_positive, help="seconds that a save stalls training (default: from its bytes)")
    parser.add_argument("--html", metavar="FILE", help="also write an HTML page with charts")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _notes(config: Config, plan: Plan, vocab: int, calibration: Calibration) -> list[str]:
    """What the reader should know beside the numbers."""
    verdict = check_config(config)
    notes = [f"{notice.path}: {notice.text}" for notice in verdict.notices]
    notes += [f"{problem.path}: {problem.rule}" for problem in verdict.problems if problem.path in ONLY_FOR_PLANS]
    if plan.job.machine.gpu.name == HOST_NAME:
        notes.append("cluster.gpu is not set: a process is taken for a slow GPU, good for an order of magnitude only")
    if calibration.source:
        scales = f"time x{calibration.time_scale:.3f}, memory x{calibration.memory_scale:.3f}"
        notes.append(f"calibrated by {calibration.source}: {scales}")
    notes += savings(plan, config)
    ledger = plan.ledger
    if ledger.verdict == AT_RISK:
        notes.append(at_risk_text(ledger))
    if not plan.fits:
        notes.append(f"stage {ledger.fullest.stage} needs {ledger.peak_gib:.1f} GiB of {ledger.capacity_gib:.1f}")
        changes = what_would_fit(config, plan, vocab, calibration)[:6]
        notes += [describe_change(change, plan) for change in changes]
        notes += [] if changes else ["no single change would help: try --search"]
    return notes


def _legal(config: Config) -> None:
    """Raises ConfigError when the config itself is not legal."""
    problems = plan_problems(config)
    if problems:
        raise ConfigError(problems)


def _without_layout(config: Config) -> None:
    """Raises ConfigError for problems that no layout could mend: those outside the searched sections."""
    searched = ("parallel", "batch.micro_batch", "batch.global_batch", "recompute", "zero")
    problems = [problem for problem in plan_problems(config) if not problem.path.startswith(searched)]
    if problems:
        raise ConfigError(problems)


def _plan_one(args: argparse.Namespace, config: Config, vocab: int, calibration: Calibration) -> None:
    config = foreign_config(config, args.engine) if args.engine else config
    _legal(config)
    job = make_job(config, vocab)
    if args.engine:
        job = as_engine(job, args.engine)
    plan, model = make_plan(job, calibration), model_dict(job)
    failures = Failures(args.gpu_mtbf_hours, args.restart_s, args.save_s)
    run = estimate_run(config, job, plan.timing.step_s, failures)
    notes = [foreign_note(args.engine)] if args.engine else _notes(config, plan, vocab, calibration)
    if args.html:
        write_plan_page(args.html, args.config, plan, run, notes, args.engine)
    if args.json:
        print(json.dumps({"model": model} | foreign_mark(args.engine) | plan.as_dict() | {"run": run.as_dict(), "notes": notes}))
    else:
        print(report.plan_text(args.config, plan, run, model, notes))


def _plan_search(args: argparse.Namespace, loaded: Loaded, vocab: int, calibration: Calibration) -> None:
    config, free_dispatcher = loaded.config, loaded.origin["model.moe.dispatcher"] == "default"
    _without_layout(config)
    result = search(config, vocab, make_machine(config), calibration, free_dispatcher, args.engine)
    if args.robust:
        result = replace(result, candidates=robust_first(result.candidates))
    reasons = explain(result)
    if args.html:
        write_search_page(args.html, args.config, result, args.top, reasons)
    if not args.json:
        print(report.search_text(result, args.top, reasons))
        return
    failures = Failures(args.gpu_mtbf_hours, args.restart_s, args.save_s)
    candidates: list[dict[str, Any]] = []
    for number, candidate in enumerate(result.candidates[: args.top]):
        run = estimate_run(candidate.config, candidate.plan.job, candidate.plan.timing.step_s, failures)
        words = {"settings": candidate.words, "pareto": candidate.pareto, "tie": candidate.tie, "run": run.as_dict(), "notes": []}
        words |= {"risk": risk_of(candidate.plan).as_dict()} if number < report.RISKS else {}
        model = {"model": model_dict(candidate.plan.job)} | foreign_mark(args.engine)
        candidates.append(model | candidate.plan.as_dict() | words)
    refused = [{"rule": rule, "layouts": number} for rule, number in result.refused.items()]
    refused += [{"rule": "memory", "layouts": len(result.too_large)}] if result.too_large else []
    document = foreign_mark(args.engine) | {
        "candidates": candidates,
        "tried": result.tried,
        "fitting": len(result.candidates),
        "refused": refused,
    }
    print(json.dumps(document | {"notes": reasons}))


def main(argv: list[str]) -> int:
    """Run a command line whose first word is the command's name: plan or plan-validate."""
    return (_validate if argv[0] == "plan-validate" else _plan)(argv[1:])


def _plan(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    if args.top < 1:
        raise ConfigError(Problem("--top", args.top, "must be at least 1", "leave it out for 10"))
    if args.html:
        # Before a search that takes minutes.
        plotly_script()
    if args.measured:
        return _plan_measured(args)
    loaded = load_config(args.config, args.overrides)
    vocab = vocab_size(loaded.config)
    calibration = calibrate(args.calibrate, loaded.config) if args.calibrate else UNCALIBRATED
    if args.search:
        _plan_search(args, loaded, vocab, calibration)
    else:
        _plan_one(args, loaded.config, vocab, calibration)
    return 0


def _plan_measured(args: argparse.Namespace) -> int:
    if args.overrides or args.search or args.calibrate or args.engine:
        rule = "a run's own config is compared with its record, unchanged"
        raise ConfigError(
            Problem("--measured", args.overrides or "--search, --calibrate, --engine", rule, "leave the other words out")
        )
    if args.html:
        raise ConfigError(Problem("--html", args.html, "a run's plan beside its record is in its report", "phalanx report RUN"))
    found = measure(args.config)
    print(json.dumps(json_value(found.as_dict())) if args.json else measured_text(found))
    return 0


def read_rows(path: str) -> list[dict[str, Any]]:
    """Published rows of a file: a JSON list of objects. Raises ConfigError."""
    fix = "give a JSON list of rows, as tools/planner/data/published_runs.json"
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(path, str(error), "must be a readable file", fix)) from error
    except json.JSONDecodeError as error:
        raise ConfigError(Problem(path, str(error), "must be JSON", fix)) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(Problem(path, type(rows).__name__, "must be a list of objects", fix))
    return rows


def _validate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="phalanx plan-validate", description="The planner's predictions against published runs: errors by source."
    )
    parser.add_argument("rows", metavar="ROWS.json", help="a JSON list of rows (format: tools/planner/data/README.md)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args(argv)
    document = validate(read_rows(args.rows))
    print(json.dumps(document) if args.json else report.validation_text(document))
    return 0
