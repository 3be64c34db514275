"""What the finished runs of a ladder measured, and the law of it. In: a `Ladder` and its states. Out: observations, a law.

Torch-free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError, Problem
from configs.load import Loaded
from parallel.flops import count_parameters
from pretrain.data.tokenizer import vocab_size
from pretrain.run.folder import RunFolder
from pretrain.run.follow import RecordFollower
from tools.ladder.ladder_file import Ladder, Point
from tools.ladder.scaling import Observation, ScalingLaw, fit
from tools.ladder.state import PointState

# Without validation, the mean of so many training losses is the final one.
LAST_ROWS = 20


@dataclass(frozen=True)
class _FinalNumbers:
    """Of a whole record. `val_loss`: the last one, wherever it stands."""

    tokens: float | None
    loss: float | None
    val_loss: float | None


def observe(ladder: Ladder) -> list[Observation]:
    """The final loss of each run: the last validation loss where every run has one, else the mean of the last training losses.

    Raises ConfigError if a record has no loss.
    """
    found = [(point, loaded, _final_numbers(RunFolder(ladder.run_dir(point)).metrics)) for point, loaded in ladder.load()]
    validated = all(numbers.val_loss is not None for _, _, numbers in found)
    return [_observation(point, loaded, numbers, validated) for point, loaded, numbers in found]


def law_of(ladder: Ladder, states: Sequence[PointState]) -> tuple[ScalingLaw | str, list[Observation]]:
    """The law once no point is missing, or why there is none; and what the runs measured."""
    missing = [state.point.name for state in states if not state.finished]
    if missing:
        return f"after {len(missing)} more points: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}", []
    observations = observe(ladder)
    return fit(observations), observations


def _observation(point: Point, loaded: Loaded, numbers: _FinalNumbers, validated: bool) -> Observation:
    loss = numbers.val_loss if validated else numbers.loss
    if loss is None or numbers.tokens is None:
        fix = "launch the ladder again"
        raise ConfigError(Problem(f"{point.name}: metrics.jsonl", "neither", "the rows hold loss and tokens", fix))
    size = count_parameters(loaded.config.model, vocab_size(loaded.config)).active["all"]
    return Observation(point.name, float(size), numbers.tokens, loss)


def _final_numbers(record: Path) -> _FinalNumbers:
    """Reads the whole record, some megabytes at a time."""
    losses: deque[float] = deque(maxlen=LAST_ROWS)
    newest: dict[str, float] = {}
    for rows in RecordFollower(record).parts():
        for row in rows:
            numbers = {key: row[key] for key in ("loss", "val_loss", "tokens") if _is_number(row.get(key))}
            newest |= numbers
            if "loss" in numbers:
                losses.append(numbers["loss"])
    return _FinalNumbers(newest.get("tokens"), sum(losses) / len(losses) if losses else None, newest.get("val_loss"))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
