"""A ladder whose runs have finished, written as a launch and its runs write them. Losses are within 0.1% of a known law."""

from __future__ import annotations

import json
import math
from pathlib import Path

from parallel.flops import count_parameters
from pretrain.run.folder import RunFolder
from tests.tools.report.world import make_run, row
from tools.ladder.ladder_file import Ladder, read_ladder

BASE = """
base: [model/tiny_moe, cluster/laptop]
run: {steps: 240}
model: {vocab_size: 512}
batch: {global_batch_seqs: 8, micro_batch_seqs: 4, seq_length_tokens: 128}
precision: {params: fp32, grads: fp32}
schedule: {warmup_steps: 2}
"""
FILE = """
ladder:
  base: base.yaml
  dir: {dir}
  grid:
    model.hidden_size: [64, 96, 128, 192]
    run.steps: [200, 400, 800]
"""
E, ALPHA, BETA = 1.7, 0.34, 0.28


def true_loss(parameters: float, tokens: float) -> float:
    return E + 40 / parameters**ALPHA + 60 / tokens**BETA


def make_ladder(path: Path, points: int = 12) -> Ladder:
    """The first `points` of twelve points have finished; the others have not begun."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "base.yaml").write_text(BASE)
    (path / "sizes.yaml").write_text(FILE.format(dir=path / "runs"))
    ladder = read_ladder(str(path / "sizes.yaml"))
    ladder.write()
    for point, loaded in ladder.load()[:points]:
        folder = make_run(ladder.run_dir(point), 40, *point.words)
        finish(folder, loaded.config.run.steps or 0, count_parameters(loaded.config.model, 512).active["all"])
    return ladder


def finish(folder: RunFolder, steps: int, parameters: int) -> None:
    """One more row: the last step's. Its validation loss is followed by many rows without one, which count more tokens."""
    tokens = steps * 8 * 128
    loss = true_loss(parameters, tokens) * (1 + 1e-3 * math.sin(tokens * parameters))
    later = {"filler": "x" * 1000, "tokens": 3 * tokens}
    rows = [row(41, loss) | {"val_loss": loss, "tokens": tokens}, *(row(42 + at, loss + 1) | later for at in range(300))]
    with open(folder.metrics, "a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in rows))
