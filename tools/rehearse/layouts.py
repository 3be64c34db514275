"""Which layouts a rehearsal trains, shrunken, and what its ranks need before they are forked.

In: the words of the command. Out: configs, or a ConfigError with every problem.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from copy import deepcopy
from pathlib import Path

from configs.errors import ConfigError, Problem
from configs.load import load_config
from configs.schema import Config
from parallel.compat.supported import engine_problems
from parallel.legality.verdict import check_config
from pretrain.build import import_deepspeed
from pretrain.preflight.nvme import check_nvme
from pretrain.run.process import importing
from tools.rehearse.covering_layouts import MICRO_BATCHES, covering_subset, legal_layouts
from tools.rehearse.shrink import common_divisors, fit_degrees, shrink

# Sections that a rehearsal replaces: it has its own batches and steps, and no data.
OWN_SECTIONS = ("batch", "run", "data", "schedule", "checkpoint")


def configs_to_rehearse(args: argparse.Namespace) -> list[Config]:
    """The configs that the words of the command ask for, checked, with their libraries imported. Raises ConfigError."""
    cuts = parse_micro_batches(args.micro_batches)
    configs = choose_layouts(args.config, args.overrides, args.layouts, args.strength, args.max_ranks, cuts)
    if problems := check_layouts(configs):
        raise ConfigError(problems)
    if args.device == "cpu":
        import_for_ranks(configs)
    else:
        # Megatron-Core's overlapping schedule needs bf16 on a GPU, and rehearsals compare in fp32.
        for config in configs:
            config.parallel.overlap_expert_comm = False
    return configs


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
    found = [problem for config in configs for problem in (*check_config(config).problems, *engine_problems(config))]
    if problems := [problem for problem in found if not problem.path.startswith(OWN_SECTIONS)]:
        raise ConfigError(list(dict.fromkeys(problems)))
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


def parse_micro_batches(text: str | None) -> list[int] | None:
    """`--micro-batches 1,2,4` as numbers of sequences. Raises ConfigError."""
    if text is None:
        return None
    words = text.split(",")
    if not all(word in ("1", "2", "4") for word in words) or len(set(words)) < len(words):
        rule = "must name different numbers of sequences out of 1, 2 and 4, with commas between them"
        raise ConfigError(Problem("--micro-batches", text, rule, "e.g. --micro-batches 1,2"))
    return [int(word) for word in words]


def import_for_ranks(configs: list[Config]) -> None:
    """Import what each rank would import after its fork: it saves 3 s of CPU per rank, 5 s with DeepSpeed's own Adam."""
    if not any(config.zero.engine == "deepspeed" for config in configs):
        return
    with importing():
        import_deepspeed("cpu")
        runtime = importlib.import_module("pretrain.engine.deepspeed_runtime")
    if any(config.zero.offload != "none" for config in configs) and runtime.can_compile():
        runtime.build_adam()
