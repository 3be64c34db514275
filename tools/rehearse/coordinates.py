"""`phalanx rehearse CONFIG --coordinates 1,2,4,8`: the coordinate check of Yang et al. (arXiv 2203.03466, appendix D.1).

Small models of the config's kind, each so many times as wide as the first, take a few optimizer steps on one process. What is
printed is the mean absolute value of the outputs of each kind of module, by width and step. With muP none of them grows with
the width; in the standard parametrization those of later steps do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from configs.errors import ConfigError, Problem
from configs.load import load_config
from configs.schema import Config, Parallel, Zero
from parallel.architecture import is_mla
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.legality.verdict import check_config
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from tools.rehearse.local_ranks import run_ranks
from tools.rehearse.shrink import VOCAB_SIZE, CommonDivisors, shrink
from tools.rehearse.train_rank import random_batches
from tools.report.plan_pages import write_coordinates_page
from tools.text_table import table

# An exponent of the width above this is growth. In the standard parametrization the last steps have exponents near 0.5 and 1.
FLAT = 0.2
HIDDEN_SIZE, LEARNING_RATE = 32, 1e-2
# kind → [step]
Coordinates = dict[str, list[float]]


def check_coordinates(args: argparse.Namespace) -> int:
    """Print the check. Returns 0 where every coordinate is flat, 1 where one grows. Raises ConfigError for bad input."""
    widths = _widths(args.coordinates)
    config = load_config(args.config, args.overrides).config
    if problems := check_config(config).problems:
        raise ConfigError(problems)
    found = {width: run_ranks(1, measure, at_width(config, width), args.steps)[0] for width in widths}
    exponents = {kind: exponent(widths, [found[width][kind][-1] for width in widths]) for kind in found[widths[0]]}
    growing = sorted(kind for kind, value in exponents.items() if value > FLAT)
    values = {kind: {str(width): found[width][kind] for width in widths} for kind in exponents}
    document = {"flat": not growing, "growing": growing, "exponents": exponents, "coordinates": values}
    if args.html:
        write_coordinates_page(args.html, args.config, title_of(config), verdict_of(growing), document)
    print(json.dumps(document) if args.json else coordinates_text(config, widths, found, exponents, growing))
    return 1 if growing else 0


def _widths(words: str) -> list[int]:
    try:
        widths = sorted({int(word) for word in words.split(",")})
    except ValueError:
        widths = []
    if len(widths) < 2 or widths[0] < 1 or widths[-1] > 64:
        rule = "must be at least two whole numbers from 1 to 64"
        raise ConfigError(Problem("--coordinates", words, rule, "for example --coordinates 1,2,4,8"))
    return widths


def at_width(config: Config, width: int) -> Config:
    """The small model on one process, `width` times as wide. Heads grow in number."""
    small = deepcopy(config)
    small.parallel, small.zero = Parallel(), Zero(engine="megatron", stage=0)
    small.launch.nodes = small.launch.processes_per_node = 1
    small.batch.micro_batch_seqs = 4
    small = shrink(small, CommonDivisors(1, 1, 1, 1, 2, 16))
    # Large steps, so that a few of them show what the learning rates do.
    small.optimizer.lr = LEARNING_RATE
    model, moe, attention = small.model, small.model.moe, small.model.attention
    model.hidden_size, model.ffn_hidden_size = HIDDEN_SIZE * width, 2 * HIDDEN_SIZE * width
    attention.num_heads *= width
    attention.num_query_groups = attention.num_query_groups and attention.num_query_groups * width
    if moe.num_experts:
        moe.ffn_hidden_size = 24 * width
        moe.shared_ffn_hidden_size = moe.shared_ffn_hidden_size and moe.shared_ffn_hidden_size * width
    if is_mla(model):
        model.mla.kv_lora_rank = (model.mla.kv_lora_rank or 0) * width
        model.mla.q_lora_rank = model.mla.q_lora_rank and model.mla.q_lora_rank * width
    if model.mup.base_hidden_size:
        model.mup.base_hidden_size = HIDDEN_SIZE
    return small


def measure(config: Config, steps: int) -> Coordinates:
    """The coordinates before the first step and after each of them, on this process."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    layout, runtime = make_layout(config), start(os.environ)
    chunks = make_chunks(config.model, 1, 1, VOCAB_SIZE, None)
    groups = make_groups(layout, config.run.seed)
    model = make_model(config, VOCAB_SIZE, layout, chunks, groups, runtime.device)
    engine = make_engine(config, model, groups, runtime.device)
    sums: defaultdict[str, list[float]] = defaultdict(list)
    for name, module in model[0].named_modules():
        if kind := _kind(name):
            _watch(module, sums[kind])
    found: Coordinates = {kind: [] for kind in sums}
    # Always the same batch: its values are compared before and after each step.
    batches = random_batches(config, 0, 0, 1)
    for step in range(steps + 1):
        engine.evaluate(batches)
        for kind, values in sums.items():
            found[kind].append(sum(values) / len(values))
            values.clear()
        if step < steps:
            engine.step(batches, config.optimizer.lr)
            for values in sums.values():
                values.clear()
    return found


def _kind(name: str) -> str | None:
    """What the output of this module is called; a layer's own output is the residual stream."""
    parts = name.split(".")
    if parts[:-1] == ["decoder", "layers"]:
        return "residual"
    if len(parts) == 4 and parts[:2] == ["decoder", "layers"]:
        return {"self_attention": "attention", "mlp": "mlp"}.get(parts[-1])
    return {"embedding": "embedding", "output_layer": "logits"}.get(name)


def _watch(module: nn.Module, values: list[float]) -> None:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        values.append(float(tensor.detach().float().abs().mean()))

    module.register_forward_hook(hook)


def exponent(widths: Sequence[int], values: Sequence[float]) -> float:
    """The least-squares exponent of the width that the values grow with."""
    x, y = (torch.tensor([math.log(value) for value in part]) for part in (widths, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def title_of(config: Config) -> str:
    """The model and its parametrization."""
    base = config.model.mup.base_hidden_size
    return f"{config.model.name}, {f'muP, base {base}' if base else 'standard parametrization'}"


def verdict_of(growing: Sequence[str]) -> str:
    """`growing`: the kinds whose outputs grow with the width."""
    return f"NOT FLAT: {', '.join(growing)} grow faster than width^{FLAT}" if growing else "flat: nothing grows with the width"


def coordinates_text(
    config: Config, widths: Sequence[int], found: dict[int, Coordinates], exponents: dict[str, float], growing: Sequence[str]
) -> str:
    """A table of each kind, then the verdict."""
    steps = len(next(iter(found[widths[0]].values())))
    lines = [f"{title_of(config)}: mean absolute outputs by width and step"]
    for kind, power in exponents.items():
        rows = [[f"x {width}", *(f"{value:.3g}" for value in found[width][kind])] for width in widths]
        lines += ["", table((kind, *(f"step {step}" for step in range(steps))), rows), f"grows as width^{power:.2f} at the end"]
    return "\n".join([*lines, "", verdict_of(growing)])
