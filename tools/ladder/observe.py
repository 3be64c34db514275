"""What the finished runs of a ladder measured. In: a `Ladder`. Out: an `Observation` for each run.

Torch-free.
"""

from __future__ import annotations

from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import Loaded
from parallel.flops import count_parameters
from pretrain.data.tokenizer import vocab_size
from pretrain.run.files import recent_rows
from pretrain.run.folder import RunFolder
from tools.ladder.ladder_file import Ladder, Point
from tools.ladder.scaling import Observation

# Without validation, the mean of so many training losses is the final one.
LAST_ROWS = 20


def observe(ladder: Ladder) -> list[Observation]:
    """The final loss of each run: the last validation loss where every run has one, else the mean of the last training losses.

    Raises ConfigError if a record has no loss.
    """
    found = [(point, loaded, recent_rows(RunFolder(ladder.run_dir(point)).metrics)) for point, loaded in ladder.load()]
    key = "val_loss" if all(_numbers(rows, "val_loss") for _, _, rows in found) else "loss"
    return [_observation(point, loaded, rows, key) for point, loaded, rows in found]


def _observation(point: Point, loaded: Loaded, rows: list[dict[str, Any]], key: str) -> Observation:
    losses, tokens = _numbers(rows, key), _numbers(rows, "tokens")
    if not losses or not tokens:
        fix = "launch the ladder again"
        raise ConfigError(Problem(f"{point.name}: metrics.jsonl", len(rows), "the last rows hold loss and tokens", fix))
    used = losses[-1:] if key == "val_loss" else losses[-LAST_ROWS:]
    size = count_parameters(loaded.config.model, vocab_size(loaded.config)).active["all"]
    return Observation(point.name, float(size), tokens[-1], sum(used) / len(used))


def _numbers(rows: list[dict[str, Any]], key: str) -> list[float]:
    values = [row.get(key) for row in rows]
    return [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
