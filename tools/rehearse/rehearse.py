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
from configs.schema import Config, Zero
from parallel.layout import make_layout
from parallel.legality.verdict import check_config
from pretrain.build import import_deepspeed
from pretrain.preflight.nvme import check_nvme
from pretrain.run.process import importing
from tools.rehearse.compare import Comparison, compare
from tools.rehearse.covering_layouts import covering_subset, legal_layouts
from tools.rehearse.local_ranks import RankFailed, run_ranks
from tools.rehearse.shrink import CommonDivisors, common_divisors, fit_degrees, omitted_features, shrink
from tools.rehearse.train_rank import RankResult, train

# Sections that a rehearsal replaces: it has its own batches and steps, and no data.
OWN_SECTIONS = ("batch", "run", "data", "schedule", "checkpoint")


def choose_layouts(source: str, overrides: list[str], wanted: str | None, strength: int, max_ranks: int) -> list[Config]:
    """The configs to rehearse. Raises ConfigError for what the run itself would be refused for."""
    config = load_config(source, overrides).config
    if wanted is None:
        return _fitted([config])
    if wanted == "auto":
        return [layout for _, layout in covering_subset(list(legal_layouts(config, max_ranks)), strength)]
    try:
        listed = json.loads(Path(wanted).read_text(encoding="utf-8"))
        words = [[f"{key}={json.dumps(value)}" for key, value in layout.items()] for layout in listed]
    except (OSError, ValueError, AttributeError) as error:
        rule = f"must be a JSON list of overrides: {error}"
        raise ConfigError(Problem("--layouts", wanted, rule, 'e.g. [{"parallel.tensor": 2, "zero.stage": 1}]')) from error
    return _fitted([load_config(source, [*overrides, *more]).config for more in words])


def _fitted(configs: list[Config]) -> list[Config]:
    found = [problem for config in configs for problem in check_config(config).problems]
    if problems := [problem for problem in found if not problem.path.startswith(OWN_SECTIONS)]:
        raise ConfigError(problems)
    return [fit_degrees(config) for config in configs]


def check_layouts(configs: list[Config]) -> list[Problem]:
    """Problems of the shrunken configs on this machine."""
    problems = []
    for config in configs:
        small = shrink(config, common_divisors([make_layout(config)]))
        problems += check_config(small).problems or check_nvme(with_disk(small, tempfile.gettempdir()))
    return problems


def with_disk(config: Config, folder: str) -> Config:
    """The config with `folder` in place of its NVMe disk."""
    config = deepcopy(config)
    config.zero.nvme_path = config.zero.nvme_path and folder
    return config


def reference_of(config: Config, common: CommonDivisors) -> Config:
    """The same model and batches on one process, without sharding."""
    single = deepcopy(config)
    parallel = single.parallel
    parallel.tensor = parallel.pipeline = parallel.context = parallel.expert = parallel.expert_tensor = 1
    parallel.virtual_pipeline, parallel.sequence, parallel.pipeline_split = None, None, None
    parallel.overlap_expert_comm = False
    single.launch.nodes = single.launch.processes_per_node = 1
    single.zero = Zero(engine="megatron", stage=0)
    return shrink(single, common)


def rehearse_one(config: Config, reference: RankResult, common: CommonDivisors, steps: int) -> dict[str, Any]:
    """The row of one layout in the report."""
    layout = make_layout(config)
    started_s = time.perf_counter()
    zero = config.zero
    head: dict[str, Any] = {"layout": layout.describe(), "engine": zero.engine, "zero": zero.stage, "offload": zero.offload}
    head["ranks"] = layout.world_size
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
    name = f"{line['layout']:<24} {line['engine']} ZeRO-{line['zero']}{offload}"
    if "error" in line:
        return f"{name:<60} FAILED\n{line['error']}"
    numbers = " ".join(f"{line[key]:9.1e}" for key in ("loss_max_rel", "grad_norm_max_rel", "grad_max_rel", "weight_max_rel"))
    verdict = "same" if line["ok"] else f"WRONG: {line['first_difference']}"
    verdict = "bit-equal" if line["bit_equal"] else verdict
    return f"{name:<60} {numbers}  {verdict}"


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
    configs = choose_layouts(args.config, args.overrides, args.layouts, args.strength, args.max_ranks)
    if problems := check_layouts(configs):
        raise ConfigError(problems)
    if args.device == "cpu":
        _import_for_ranks(configs)
    else:
        # Megatron-Core's overlapping schedule needs bf16 on a GPU, and rehearsals compare in fp32.
        for config in configs:
            config.parallel.overlap_expert_comm = False
    common = common_divisors([make_layout(config) for config in configs])
    say = sys.stderr if args.json else sys.stdout
    try:
        (reference,) = run_ranks(1, train, reference_of(configs[0], common), args.steps)
    except RankFailed as error:
        print(f"the reference on one process FAILED\n{error}", file=sys.stderr)
        return 1
    print(f"{'layout':<60} {'loss':>9} {'norm':>9} {'gradients':>9} {'weights':>9}", file=say)
    lines = []
    for config in configs:
        lines.append(rehearse_one(config, reference, common, args.steps))
        print(describe(lines[-1]), file=say, flush=True)
    wrong = [line for line in lines if not line["ok"]]
    if without := omitted_features(configs[0].model):
        print(f"left out, since they depend on the layout by design: {', '.join(without)}", file=say)
    if reference.near_ties:
        text = "choices of experts are near ties: another rounding may correctly choose other experts"
        print(f"{reference.near_ties} {text}", file=say)
    print(f"{len(lines) - len(wrong)} of {len(lines)} layouts agree with one process", file=say)
    if args.json:
        first = {
            "loss": reference.losses,
            "grad_norm": reference.grad_norms,
            "steps": args.steps,
            "router_near_ties": reference.near_ties,
        }
        print(json.dumps({"reference": first, "layouts": lines, "left_out": omitted_features(configs[0].model)}))
    return 1 if wrong else 0
