"""Rehearsal: does a layout compute what a single process computes?

The real engines run on at most 16 local gloo ranks, with a small model of the same kind, the same initial weights by name and
the same batches. Compared are loss and gradient norm of every step, every gradient of the first step, and every weight after
the last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from configs.schema import Config
from parallel.layout import make_layout
from tools.rehearse.compare import compare
from tools.rehearse.layouts import configs_to_rehearse, with_disk
from tools.rehearse.local_ranks import RankFailed, run_ranks
from tools.rehearse.reference import reference_key, reference_micro_batch_seqs, reference_of
from tools.rehearse.report import describe, head_of, header_of, model_notes, near_tie_notes
from tools.rehearse.shrink import CommonDivisors, common_divisors, omitted_features, replaced_precision, shrink
from tools.rehearse.train_rank import RankResult, train
from tools.report.plan_pages import write_rehearsal_page


def rehearse_one(config: Config, reference: RankResult, common: CommonDivisors, steps: int) -> dict[str, Any]:
    """The row of one layout in the report."""
    started_s = time.perf_counter()
    head = head_of(config) | {"reference_micro_batch_seqs": reference_micro_batch_seqs(config)}
    try:
        with tempfile.TemporaryDirectory() as disk:
            ranks = run_ranks(make_layout(config).world_size, train, with_disk(shrink(config, common), disk), steps)
        result = compare(ranks, [reference])
    except (RankFailed, ValueError) as error:
        return head | {"ok": False, "error": str(error), "seconds": round(time.perf_counter() - started_s, 2)}
    return head | result.as_dict() | {"seconds": round(time.perf_counter() - started_s, 2)}


def rehearse(args: argparse.Namespace) -> int:
    """Returns the exit code. 0: every layout agrees with one process; 1: a layout differs. Raises ConfigError for bad input."""
    configs = configs_to_rehearse(args)
    common = common_divisors(configs)
    say = sys.stderr if args.json else sys.stdout
    try:
        references = {
            key: run_ranks(1, train, reference_of(config, common), args.steps)[0]
            for key, config in {reference_key(config): config for config in configs}.items()
        }
    except RankFailed as error:
        print(f"the reference on one process FAILED\n{error}", file=sys.stderr)
        return 1
    print(header_of(configs), file=say)
    lines = []
    for config in configs:
        lines.append(rehearse_one(config, references[reference_key(config)], common, args.steps))
        print(describe(lines[-1]), file=say, flush=True)
    for text in notes(configs, references):
        print(text, file=say)
    if args.html:
        write_rehearsal_page(args.html, args.config, lines, notes(configs, references))
    wrong = [line for line in lines if not line["ok"]]
    print(f"{len(lines) - len(wrong)} of {len(lines)} layouts agree with one process", file=say)
    if args.json:
        first = references[reference_key(configs[0])]
        reference = {
            "loss": first.losses,
            "grad_norm": first.grad_norms,
            "steps": args.steps,
            "router_near_ties": sum(found.near_ties for found in references.values()),
        }
        report = {"reference": reference, "layouts": lines, "left_out": omitted_features(configs[0].model)}
        print(json.dumps(report | {"replaced_by_fp32": replaced_precision(configs[0])}))
    return 1 if wrong else 0


def notes(configs: list[Config], references: Mapping[Any, RankResult]) -> list[str]:
    """What a reader must know to judge the table."""
    found = model_notes(configs[0])
    if any(reference_micro_batch_seqs(config) > 1 for config in configs):
        balance = configs[0].model.moe.router.balance
        found.append(f"{balance} depends on how the global batch is cut: each layout's reference is cut like the layout")
    elif any(config.batch.micro_batch_seqs > 1 for config in configs):
        found.append("the reference takes one sequence at a time: no loss depends on how the global batch is cut")
    return found + near_tie_notes(references.values())
