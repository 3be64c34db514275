"""The verdict on a whole config before anything starts: every problem at once, and notices on what is legal.

In: a Config. Out: a `Verdict`. Single keys are checked first (configs/fields.py), then the rules between keys: one short
function each, in this folder. A rule that reads a key already found bad is skipped. Nothing is changed or raised.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from configs.errors import Notice, Problem
from configs.fields import check_keys
from configs.schema import Config
from parallel.layout import Layout, make_layout
from parallel.legality import engine as rules_engine
from parallel.legality import experts as rules_experts
from parallel.legality import layout as rules_layout
from parallel.legality import model as rules_model
from parallel.legality import notices
from parallel.legality import optimizer as rules_optimizer
from parallel.legality import run as rules_run
from parallel.legality import slurm as rules_slurm
from parallel.legality.rules import LegalityRule

PROBLEM_RULES: tuple[LegalityRule[Problem], ...] = (
    *rules_layout.RULES,
    *rules_model.RULES,
    *rules_experts.RULES,
    *rules_engine.RULES,
    *rules_optimizer.RULES,
    *rules_run.RULES,
    *rules_slurm.RULES,
)
NOTICE_RULES: tuple[LegalityRule[Notice], ...] = notices.RULES


@dataclass(frozen=True)
class Verdict:
    """Problems and notices of a config. It is legal when it has no problem."""

    problems: tuple[Problem, ...]
    notices: tuple[Notice, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def check_config(config: Config, doubtful: Iterable[str] = ()) -> Verdict:
    """Every problem and notice of a config of the right types. Never raises; costs about a millisecond.

    `doubtful`: keys that could not be read. A rule that reads one of them is skipped.
    """
    problems = check_keys(config)
    bad = [*doubtful, *(problem.path for problem in problems)]
    found = [problem for rule in PROBLEM_RULES if rule.applies(bad) for problem in rule.check(config)]
    seen = [notice for rule in NOTICE_RULES if rule.applies(bad) for notice in rule.check(config)]
    return Verdict(tuple(problems + found), tuple(seen))


def derive_layout(config: Config) -> Layout | None:
    """The layout of a config, whatever other problems it has; None when its degrees do not divide the world."""
    bad = [problem.path for problem in check_keys(config)]
    rules = (rules_layout.degrees_divide_world, rules_layout.expert_degrees_divide_world)
    if not all(rule.applies(bad) and not list(rule.check(config)) for rule in rules):
        return None
    return make_layout(config) if not any(path.startswith("parallel") for path in bad) else None
