"""The summary at the end of a run. In: a `RunSummary`. Out: a short table, as text.

Torch-free.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from configs.schema import Config
from configs.units import count, duration
from parallel.batch import steps_of
from pretrain.metrics.console import val_losses
from pretrain.run.files import read_json
from pretrain.run.folder import Outcome, RunFolder
from pretrain.run.record_rows import read_rows, rows_from_end, steps_seconds

# The speed is the median of so many rows, and the newest validation is looked for in them.
_NEWEST_ROWS = 10_000


@dataclass(frozen=True)
class RunSummary:
    """The numbers of the summary. Losses are in nats a token. None: unknown, and the line is left out."""

    outcome: Outcome
    folder: RunFolder
    total_steps: int
    first_loss: float | None = None
    last_loss: float | None = None
    vocab_size: int | None = None
    unigram_entropy: float | None = None
    val_losses: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None
    tokens_per_s: float | None = None
    wall_s: float | None = None
    checkpoint: str | None = None
    wandb_place: str | None = None


def make_summary(
    config: Config,
    folder: RunFolder,
    outcome: Outcome,
    tokens: int,
    vocab_size: int,
    checkpoint: Path | None,
    wandb_place: str | None,
) -> RunSummary:
    """Collect the summary from the record's first row and its newest ones, and from the data's .meta.json."""
    path = folder.metrics
    first = next(read_rows(path), {}) if path.exists() else {}
    rows = list(islice(rows_from_end(path), _NEWEST_ROWS))[::-1] if path.exists() else []
    speeds = sorted(row["tokens_per_s"] for row in rows if row.get("tokens_per_s"))
    validated = {key: loss for row in rows for key, loss in val_losses(row).items()}
    meta = read_json(Path(f"{config.data.train[0].path}.meta.json"))
    return RunSummary(
        outcome=outcome,
        folder=folder,
        total_steps=steps_of(config),
        first_loss=first.get("loss"),
        last_loss=rows[-1].get("loss") if rows else None,
        vocab_size=vocab_size,
        unigram_entropy=meta.get("unigram_entropy_nats") if isinstance(meta, dict) else None,
        val_losses=validated,
        tokens=tokens,
        tokens_per_s=speeds[len(speeds) // 2] if speeds else None,
        wall_s=steps_seconds(path) or None,
        checkpoint=str(checkpoint) if checkpoint else None,
        wandb_place=wandb_place,
    )


def summary(run: RunSummary) -> str:
    """The summary as aligned lines `name  value`, followed by the commands to type next."""
    lines = [(name, value) for name, value in _lines(run) if value is not None]
    width = max(len(name) for name, _ in lines)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in lines), "", *_next_commands(run)])


def _lines(run: RunSummary) -> list[tuple[str, str | None]]:
    outcome = run.outcome
    return [
        (outcome.state, f"step {outcome.step} of {run.total_steps}: {outcome.why}"),
        ("loss", _arrow(run.first_loss, run.last_loss)),
        ("ln(vocab)", _number(math.log(run.vocab_size)) + "  a model that knows nothing" if run.vocab_size else None),
        (
            "unigram entropy",
            f"{run.unigram_entropy:.4f}  a model that knows how often each token comes" if run.unigram_entropy else None,
        ),
        *((key.replace("val_loss", "held-out loss").replace("/", " "), _number(loss)) for key, loss in run.val_losses.items()),
        ("trained on", _trained_on(run)),
        ("speed", f"{count(run.tokens_per_s)} tokens/s" if run.tokens_per_s else None),
        ("run folder", str(run.folder.path)),
        ("checkpoint", run.checkpoint),
        ("W&B", run.wandb_place),
    ]


def _trained_on(run: RunSummary) -> str | None:
    """The tokens of the whole run, with the training time if it is known. None: nothing was trained."""
    if not run.tokens:
        return None
    time = f" in {duration(run.wall_s)}" if run.wall_s else ""
    return f"{count(run.tokens)} tokens{time}"


def _next_commands(run: RunSummary) -> list[str]:
    place = shlex.quote(str(run.folder.path))
    page = f"  phalanx report {place}   # curves, experts and attempts as a page"
    if run.outcome.state == "finished":
        train_on = f"  phalanx resume {place} run.steps={2 * run.total_steps}   # train on"
        return ["next:", f"  phalanx status {place}", page, train_on]
    if run.outcome.state in ("stopped", "preempted"):
        return ["next:", f"  phalanx resume {place}   # go on from the last checkpoint", page]
    return ["next:", f"  phalanx logs {place}   # the first error first", f"  phalanx resume {place}", page]


def _arrow(first: float | None, last: float | None) -> str | None:
    return f"{_number(first)} → {_number(last)}" if first is not None and last is not None else None


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"
