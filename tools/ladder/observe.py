"""What the finished runs of a ladder measured, and the law of it. In: a `Ladder` and its states. Out: observations, a law.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from configs.errors import ConfigError, Problem
from configs.load import Loaded
from parallel.flops import count_parameters
from pretrain.data.tokenizer import vocab_size
from pretrain.run.files import lines_from_end, parse_line
from pretrain.run.folder import RunFolder
from tools.ladder.ladder_file import Ladder, Point
from tools.ladder.scaling import Observation, ScalingLaw, fit
from tools.ladder.state import PointState

# Without validation, the mean of so many training losses is the final one.
LAST_ROWS = 20


@dataclass(frozen=True)
class _FinalNumbers:
    """Each as (tokens that the run had trained on, loss), or None where the record has none. `validation`: the last one."""

    training: tuple[float, float] | None
    validation: tuple[float, float] | None


def observe(ladder: Ladder) -> list[Observation]:
    """The final loss of each run: the last validation loss where every run has one, else the mean of the last training losses.

    Raises ConfigError if a record has no loss.
    """
    found = [(point, loaded, _final_numbers(RunFolder(ladder.run_dir(point)).metrics)) for point, loaded in ladder.load()]
    validated = all(numbers.validation is not None for _, _, numbers in found)
    return [_observation(point, loaded, numbers, validated) for point, loaded, numbers in found]


def law_of(ladder: Ladder, states: Sequence[PointState]) -> tuple[ScalingLaw | str, list[Observation]]:
    """The law once no point is missing, or why there is none; and what the runs measured."""
    missing = [state.point.name for state in states if not state.finished]
    if missing:
        return f"after {len(missing)} more points: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}", []
    observations = observe(ladder)
    return fit(observations), observations


def _observation(point: Point, loaded: Loaded, numbers: _FinalNumbers, validated: bool) -> Observation:
    final = numbers.validation if validated else numbers.training
    if final is None:
        fix = "launch the ladder again"
        raise ConfigError(Problem(f"{point.name}: metrics.jsonl", "neither", "the rows hold loss and tokens", fix))
    size = count_parameters(loaded.config.model, vocab_size(loaded.config)).active["all"]
    return Observation(point.name, float(size), *final)


def _final_numbers(record: Path) -> _FinalNumbers:
    """Reads the record from its end back to the last validation loss. Lines before the last rows are searched, not parsed."""
    training: list[tuple[float, float]] = []
    validation = None
    for line in lines_from_end(record) if record.exists() else ():
        if len(training) == LAST_ROWS:
            if validation:
                break
            if b'"val_loss"' not in line:
                continue
        row = parse_line(line) or {}
        tokens, loss, val_loss = (row.get(key) for key in ("tokens", "loss", "val_loss"))
        if not _is_number(tokens):
            continue
        if _is_number(loss) and len(training) < LAST_ROWS:
            training.append((tokens, loss))
        if _is_number(val_loss) and not validation:
            validation = tokens, val_loss
    mean = sum(loss for _, loss in reversed(training)) / len(training) if training else None
    return _FinalNumbers((training[0][0], mean) if mean is not None else None, validation)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
