"""Rehearsal: does a layout compute what a single process computes?

The real engines run on at most 16 local gloo ranks, with a small model of the same kind, the same initial weights by name and
the same batches. Compared are loss and gradient norm of every step, every gradient of the first step, and every weight after
the last.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import load_config
from configs.schema import Config
from parallel.layout import make_layout
from parallel.legality.verdict import check_config
from pretrain.build import import_deepspeed
from pretrain.preflight.nvme import check_nvme
from pretrain.run.process import importing
from tools.rehearse.compare import Comparison, compare
from tools.rehearse.covering_layouts import MICRO_BATCHES, covering_subset, legal_layouts
from tools.rehearse.local_ranks import RankFailed, run_ranks
from tools.rehearse.reference import reference_micro_batch_seqs, reference_of
from tools.rehearse.shrink import CommonDivisors, common_divisors, fit_degrees, omitted_features, replaced_precision, shrink
from tools.rehearse.train_rank import RankResult, train

# Sections that a rehearsal replaces: it has its own batches and steps, and no data.
OWN_SECTIONS = ("batch", "run", "data", "schedule", "checkpoint")


def choose_layouts(
    source: str, overrides: list[str], wanted: str | None, strength: int, max_ranks: int, micro_batches: list[int] | None = None
) -> list[Config]:
    """The configs to rehearse, each layout with each of `micro_batches` (sequences; None: 1 or 2, as in the config; auto: both).

    Raises ConfigError for what the run itself would be refused for.
    """
    config = load_config(source, overrides).config
    if wanted is None:
        return with_micro_batches(_fitted([config]), micro_batches)
    if wanted == "auto":
        candidates = list(legal_layouts(config, max_ranks, micro_batches or MICRO_BATCHES))
        return [layout for _, layout in covering_subset(candidates, strength)]
    try:
        listed = json.loads(Path(wanted).read_text(encoding="utf-8"))
        words = [[f"{key}={json.dumps(value)}" for key, value in layout.items()] for layout in listed]
    except (OSError, ValueError, AttributeError) as error:
        rule = f"must be a JSON list of overrides: {error}"
        raise ConfigError(Problem("--layouts", wanted, rule, 'e.g. [{"parallel.tensor": 2, "zero.stage": 1}]')) from error
    return with_micro_batches(_fitted([load_config(source, [*overrides, *more]).config for more in words]), micro_batches)


def with_micro_batches(configs: list[Config], micro_batches: list[int] | None) -> list[Config]:
    """Each config with each of these numbers of sequences; None: as they are."""
    made = []
    for config in configs:
        for micro_batch_seqs in micro_batches or [config.batch.micro_batch_seqs]:
            made.append(deepcopy(config))
            made[-1].batch.micro_batch_seqs = micro_batch_seqs
    return made


def _fitted(configs: list[Config]) -> list[Config]:
    found = [problem for config in configs for problem in check_config(config).problems]
    if problems := [problem for problem in found if not problem.path.startswith(OWN_SECTIONS)]:
        raise ConfigError(problems)
    return [fit_degrees(config) for config in configs]


def check_layouts(configs: list[Config]) -> list[Problem]:
    """Problems of the shrunken configs on this machine."""
    problems = []
    for config in configs:
        small = shrink(config, common_divisors([config]))
        problems += check_config(small).problems or check_nvme(with_disk(small, tempfile.gettempdir()))
    return problems


def with_disk(config: Config, folder: str) -> Config:
    """The config with `folder` in place of its NVMe disk."""
    config = deepcopy(config)
    config.zero.nvme_path = config.zero.nvme_path and folder
    return config


def rehearse_one(config: Config, reference: RankResult, common: CommonDivisors, steps: int) -> dict[str, Any]:
    """The row of one layout in the report."""
    layout = make_layout(config)
    started_s = time.perf_counter()
    zero = config.zero
    head: dict[str, Any] = {"layout": layout.describe(), "engine": zero.engine, "zero": zero.stage, "offload": zero.offload}
    head |= {"ranks": layout.world_size, "micro_batch_seqs": config.batch.micro_batch_seqs}
    head["reference_micro_batch_seqs"] = reference_micro_batch_seqs(config)
    try:
        with tempfile.TemporaryDirectory() as disk:
            ranks = run_ranks(layout.world_size, train, with_disk(shrink(config, common), disk), steps)
        result: Comparison = compare(ranks, reference)
    except (RankFailed, ValueError) as error:
        return head | {"ok": False, "error": str(error), "seconds": round(time.perf_counter() - started_s, 2)}
    return head | result.as_dict() | {"seconds": round(time.perf_counter() - started_s, 2)}


def describe(line: dict[str, Any]) -> str:
    """The row as a line of text."""
    offload = f", {line['offload']} offload" * (line["offload"] != "none")
    name = f"{line['layout']:<24} {line['engine']} ZeRO-{line['zero']}{offload}, micro-batch {line['micro_batch_seqs']}"
    if "error" in line:
        return f"{name:<76} FAILED\n{line['error']}"
    numbers = " ".join(f"{line[key]:9.1e}" for key in ("loss_max_rel", "grad_norm_max_rel", "grad_max_rel", "weight_max_rel"))
    verdict = "same" if line["ok"] else f"WRONG: {line['first_difference']}"
    verdict = "bit-equal" if line["bit_equal"] else verdict
    return f"{name:<76} {numbers}  {verdict}"


def _import_for_ranks(configs: list[Config]) -> None:
    """Import what each rank would import after its fork: it saves 3 s of CPU per rank, 5 s with DeepSpeed's own Adam."""
    if not any(config.zero.engine == "deepspeed" for config in configs):
        return
    with importing():
        import_deepspeed("cpu")
        runtime = importlib.import_module("pretrain.engine.deepspeed_runtime")
    if any(config.zero.offload != "none" for config in configs) and runtime.can_compile():
        runtime.build_adam()


def rehearse(args: argparse.Namespace) -> int:
    """Returns the exit code. 0: every layout agrees with one process; 1: a layout differs. Raises ConfigError for bad input."""
    cuts = parse_micro_batches(args.micro_batches)
    configs = choose_layouts(args.config, args.overrides, args.layouts, args.strength, args.max_ranks, cuts)
    if problems := check_layouts(configs):
        raise ConfigError(problems)
    if args.device == "cpu":
        _import_for_ranks(configs)
    else:
        # Megatron-Core's overlapping schedule needs bf16 on a GPU, and rehearsals compare in fp32.
        for config in configs:
            config.parallel.overlap_expert_comm = False
    common = common_divisors(configs)
    say = sys.stderr if args.json else sys.stdout
    try:
        references = {
            cut: run_ranks(1, train, reference_of(config, common), args.steps)[0]
            for cut, config in {reference_micro_batch_seqs(config): config for config in configs}.items()
        }
    except RankFailed as error:
        print(f"the reference on one process FAILED\n{error}", file=sys.stderr)
        return 1
    print(f"{'layout':<76} {'loss':>9} {'norm':>9} {'gradients':>9} {'weights':>9}", file=say)
    lines = []
    for config in configs:
        lines.append(rehearse_one(config, references[reference_micro_batch_seqs(config)], common, args.steps))
        print(describe(lines[-1]), file=say, flush=True)
    for text in notes(configs, references):
        print(text, file=say)
    wrong = [line for line in lines if not line["ok"]]
    print(f"{len(lines) - len(wrong)} of {len(lines)} layouts agree with one process", file=say)
    if args.json:
        first = references[reference_micro_batch_seqs(configs[0])]
        reference = {
            "loss": first.losses,
            "grad_norm": first.grad_norms,
            "steps": args.steps,
            "router_near_ties": sum(found.near_ties for found in references.values()),
        }
        report = {"reference": reference, "layouts": lines, "left_out": omitted_features(configs[0].model)}
        print(json.dumps(report | {"replaced_by_fp32": replaced_precision(configs[0])}))
    return 1 if wrong else 0


def parse_micro_batches(text: str | None) -> list[int] | None:
    """`--micro-batches 1,2,4` as numbers of sequences. Raises ConfigError."""
    if text is None:
        return None
    words = text.split(",")
    if not all(word in ("1", "2", "4") for word in words) or len(set(words)) < len(words):
        rule = "must name different numbers of sequences out of 1, 2 and 4, with commas between them"
        raise ConfigError(Problem("--micro-batches", text, rule, "e.g. --micro-batches 1,2"))
    return [int(word) for word in words]


def notes(configs: list[Config], references: dict[int, RankResult]) -> list[str]:
    """What a reader must know to judge the table."""
    found = []
    if without := omitted_features(configs[0].model):
        found.append(f"left out, since they depend on the layout by design: {', '.join(without)}")
    if precision := replaced_precision(configs[0]):
        values = ", ".join(f"{path}={value}" for path, value in precision.items())
        found.append(f"rehearsed in fp32, in which layouts can be compared to 1e-4, in place of {values}")
    if any(reference_micro_batch_seqs(config) > 1 for config in configs):
        balance = configs[0].model.moe.router.balance
        found.append(f"{balance} depends on how the global batch is cut: each layout's reference is cut like the layout")
    elif any(config.batch.micro_batch_seqs > 1 for config in configs):
        found.append("the reference takes one sequence at a time: no loss depends on how the global batch is cut")
    if near := sum(reference.near_ties for reference in references.values()):
        found.append(f"{near} choices of experts are near ties: another rounding may correctly choose other experts")
    return found
