"""Rehearsal of an upgrade: do another interpreter's libraries compute what this one's compute?

Each layout is trained twice, by the libraries of this interpreter and by those of the other: the same shrunken model, initial
weights, batches and layout, and this installation's code on both sides. The tolerances are those of every rehearsal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from typing import Any

from configs.schema import Config
from parallel.layout import make_layout
from tools.rehearse.compare import compare
from tools.rehearse.layouts import configs_to_rehearse, with_disk
from tools.rehearse.library_side import describe_sides, this_side
from tools.rehearse.local_ranks import RankFailed, run_ranks
from tools.rehearse.other_interpreter import OtherInterpreter
from tools.rehearse.report import describe, head_of, header_of, model_notes, near_tie_notes
from tools.rehearse.shrink import common_divisors, shrink
from tools.rehearse.train_rank import RankResult, train


def rehearse_against(args: argparse.Namespace) -> int:
    """Returns the exit code. 0: no layout differs; 1: a layout differs or fails. Raises ConfigError for bad input."""
    configs = configs_to_rehearse(args)
    common = common_divisors(configs)
    say = sys.stderr if args.json else sys.stdout
    lines: list[dict[str, Any]] = []
    trained: list[RankResult] = []
    with OtherInterpreter(args.against) as other:
        here = this_side()
        print("\n".join(describe_sides(here, other.side)), file=say)
        print(header_of(configs), file=say, flush=True)
        for config in configs:
            line, results = _compare_sides(config, shrink(config, common), other, args.steps)
            lines.append(line)
            trained += results[:1]
            print(describe(line), file=say, flush=True)
    for text in [*model_notes(configs[0]), *near_tie_notes(trained)]:
        print(text, file=say)
    same = sum(line["ok"] for line in lines)
    print(f"{same} of {len(lines)} layouts compute the same under both", file=say)
    if args.json:
        print(json.dumps({"here": here.as_dict(), "there": other.side.as_dict(), "steps": args.steps, "layouts": lines}))
    return 0 if same == len(lines) else 1


def _compare_sides(config: Config, small: Config, other: OtherInterpreter, steps: int) -> tuple[dict[str, Any], list[RankResult]]:
    """The row of one layout, and what this interpreter's ranks computed: nothing where a side failed."""
    started_s = time.perf_counter()
    head = head_of(config)
    with tempfile.TemporaryDirectory() as disk:
        placed = with_disk(small, disk)
        results: list[list[RankResult]] = []
        failures: list[str] = []
        for side, run in (("here", _train_here), ("there", other.train)):
            try:
                results.append(run(placed, steps))
            except RankFailed as error:
                failures.append(f"{side}: {error}")
    if failures:
        return head | {"ok": False, "error": "\n".join(failures), "seconds": _since(started_s)}, []
    ranks, others = results
    numbers = {
        "loss": {"here": ranks[0].losses, "there": others[0].losses},
        "grad_norm": {"here": ranks[0].grad_norms, "there": others[0].grad_norms},
    }
    return head | numbers | compare(others, ranks).as_dict() | {"seconds": _since(started_s)}, ranks


def _train_here(config: Config, steps: int) -> list[RankResult]:
    return run_ranks(make_layout(config).world_size, train, config, steps)


def _since(started_s: float) -> float:
    return round(time.perf_counter() - started_s, 2)
