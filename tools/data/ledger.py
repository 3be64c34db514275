"""Tokens and epochs of a run by source. In: a run's history. Out: a dict for JSON, and a table.

Torch-free.
"""

from __future__ import annotations

from typing import Any

from pretrain.data.history import PLANNED, TRAINED, RunHistory, Stretch
from tools.data.traced_data import TracedData
from tools.text_table import table


def read_ledger(history: RunHistory) -> dict[str, Any]:
    """Tokens and epochs of each source: trained on, consumed without being trained on, and at the end of the plan.

    An epoch of a source is all of its samples once. Padding is no token. Raises ConfigError.
    """
    data, sources = TracedData(history), {}
    newest, end_sample = None, 0
    for stretch in history.stretches():
        passed = range(min(end_sample, stretch.first_sample), stretch.first_sample)
        _count(sources, data, stretch, passed, "passed")
        _count(sources, data, stretch, range(stretch.first_sample, stretch.end_sample), _kind(stretch))
        newest, end_sample = stretch, stretch.end_sample
    for stretch in history.planned(newest):
        _count(sources, data, stretch, range(stretch.first_sample, stretch.end_sample), "planned")
    rows = [_ledger_row(source, counts) for source, counts in sources.items()]
    total = {name: sum(row[name] for row in rows) for name in ("trained_tokens", "passed_tokens", "planned_tokens")}
    return {"run_dir": str(history.folder.path), "step": newest.end_step - 1 if newest else 0, "sources": rows, "total": total}


def _kind(stretch: Stretch) -> str:
    return stretch.state if stretch.state in (TRAINED, PLANNED) else "passed"


def _count(sources: dict[str, dict[str, int]], data: TracedData, stretch: Stretch, samples: range, kind: str) -> None:
    """Add the tokens of a range of samples to the counts of their sources. `kind`: trained, passed or planned."""
    stream = data.stream(stretch.attempt)
    before, after = (stream.counts_before(sample) for sample in (samples.start, samples.stop))
    for part, low, high in zip(stream.parts, before, after, strict=True):
        counts = sources.setdefault(part.index.prefix, {"trained": 0, "passed": 0, "planned": 0, "epoch_tokens": 0})
        counts["epoch_tokens"] = part.tokens_per_epoch
        counts[kind] += part.tokens_between(low, high)


def _ledger_row(source: str, counts: dict[str, int]) -> dict[str, Any]:
    consumed = counts["trained"] + counts["passed"]
    return {
        "source": source,
        "epoch_tokens": counts["epoch_tokens"],
        "trained_tokens": counts["trained"],
        "passed_tokens": counts["passed"],
        "epochs": consumed / counts["epoch_tokens"],
        "planned_tokens": consumed + counts["planned"],
        "planned_epochs": (consumed + counts["planned"]) / counts["epoch_tokens"],
    }


def render_ledger(found: dict[str, Any]) -> str:
    """The document of `read_ledger` as a table."""
    head = ("source", "trained tokens", "passed over", "epochs", "at the end", "epochs")
    rows = [
        (
            row["source"],
            f"{row['trained_tokens']:,}",
            f"{row['passed_tokens']:,}",
            f"{row['epochs']:.3f}",
            f"{row['planned_tokens']:,}",
            f"{row['planned_epochs']:.3f}",
        )
        for row in found["sources"]
    ]
    total = found["total"]
    last = ("total", f"{total['trained_tokens']:,}", f"{total['passed_tokens']:,}", "", f"{total['planned_tokens']:,}", "")
    return f"after step {found['step']}:\n{table(head, [*rows, last])}"
