"""Plans, searches, rehearsals and coordinate checks as pages (`--html FILE`). In: their values. Out: a self-contained HTML file.

Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, json_value
from configs.units import count, duration
from parallel.layout import Layout
from pretrain.run.files import storage_problem, write_named_file
from tools.draw_grid import draw_grid
from tools.draw_pipeline import draw_pipeline
from tools.planner.duration import RunEstimate
from tools.planner.foreign import foreign_facts
from tools.planner.planning import Plan
from tools.planner.search import SearchResult
from tools.report.page import make_page
from tools.report.settings import plan_document

# The picture of a search has the fastest ones and all of the Pareto front.
_MOST_CANDIDATES = 2000


def write_page(path: str | Path, document: dict[str, Any], title: str) -> int:
    """Write the page and return its bytes. Raises ConfigError when the disk refuses, or plotly is missing."""
    page = make_page(document, title)
    try:
        write_named_file(path, page)
    except OSError as error:
        raise ConfigError(storage_problem("the page", path, error)) from error
    return len(page)


def write_plan_page(path: str, name: str, plan: Plan, run: RunEstimate, notes: Sequence[str], engine: str | None = None) -> None:
    """`engine`: the engine of others that the plan is for."""
    job = plan.job
    layout = job.layout
    facts = foreign_facts(engine) + [
        ["step", f"{plan.timing.step_s:.3f} s"],
        ["tokens/s a GPU", f"{plan.tokens_per_s_per_gpu:,.0f}"],
        ["MFU", f"{plan.mfu:.1%}"],
        ["GPUs", f"{layout.world_size:,} x {job.machine.gpu.name}"],
        ["tokens", count(run.tokens)],
        ["days", f"{run.days:.2f}"],
        ["GPU-hours", f"{run.gpu_hours:,.0f}"],
        ["cost", None if run.cost_usd is None else f"${run.cost_usd:,.0f}"],
        ["goodput", f"{run.goodput:.1%}"],
        ["save every", duration(run.interval_s)],
    ]
    document = plan_document(plan.as_dict(), job.machine.gpu.name) | _drawings(layout, int(job.num_micro_batches))
    document |= {"title": f"{job.model.name}: {layout.describe()}", "facts": facts, "notes": list(notes)}
    _write(path, "plan", document, f"Plan of {name}")


def _drawings(layout: Layout, micro_batches: int) -> dict[str, Any]:
    return {"grid": draw_grid(layout), "pipeline": draw_pipeline(layout.pipeline, layout.virtual_pipeline, micro_batches)}


def write_search_page(path: str, name: str, result: SearchResult, top: int, reasons: Sequence[str]) -> None:
    shown = [one for number, one in enumerate(result.candidates) if number < _MOST_CANDIDATES or one.pareto]
    candidates = [
        {
            "layout": one.describe(),
            "step_s": one.plan.timing.step_s,
            "speed": one.plan.tokens_per_s_per_gpu,
            "mfu": one.plan.mfu,
            "bubble": one.plan.timing.bubble_fraction,
            "peak_gib": one.plan.ledger.peak_gib,
            "pareto": one.pareto,
            "words": list(one.words),
        }
        for one in shown
    ]
    facts = foreign_facts(result.engine) + [
        ["tried", f"{result.tried:,}"],
        ["legal and fit", str(len(result.candidates))],
        ["too large", str(len(result.too_large))],
    ]
    refused = [[rule, number] for rule, number in result.refused.items()]
    document = {"facts": facts, "candidates": candidates, "top": top, "notes": list(reasons), "refused": refused}
    _write(path, "search", document, f"Search for {name}")


def write_rehearsal_page(path: str, name: str, lines: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """`lines`: the rows of the rehearsal's report, as `phalanx rehearse --json` has them in `layouts`."""
    facts = [["layouts", str(len(lines))], ["agree with one process", str(sum(bool(line["ok"]) for line in lines))]]
    document = {"title": "Layouts against one process", "facts": facts, "layouts": list(lines), "notes": list(notes)}
    _write(path, "rehearsal", document, f"Rehearsal of {name}")


def write_coordinates_page(path: str, name: str, title: str, verdict: str, found: dict[str, Any]) -> None:
    """`found`: the document of `phalanx rehearse --coordinates --json`."""
    _write(path, "coordinates", {"title": title, "verdict": verdict, **found}, f"Coordinate check of {name}")


def _write(path: str, kind: str, document: dict[str, Any], title: str) -> None:
    write_page(path, json_value({"kind": kind, "made": time.time(), kind: document}), f"{title} · Phalanx")
