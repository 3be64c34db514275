"""What the planner asks of a config: legal, except that a model may be for planning only.

In: a Config. Out: problems. The rules themselves stand in parallel/legality/verdict.py.

Torch-free.
"""

from __future__ import annotations

from configs.errors import Problem
from configs.schema import Config
from parallel.legality.verdict import check_config

# The keys by which a model says that our engines can't train it: its sizes are right, so it can be planned.
ONLY_FOR_PLANS = ("model.planning_only", "model.dsa.top_k")


def plan_problems(config: Config) -> list[Problem]:
    """Why a config can't be planned; empty when it can."""
    return [problem for problem in check_config(config).problems if problem.path not in ONLY_FOR_PLANS]
