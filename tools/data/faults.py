"""The faults of a corpus: which are fatal, and which are passed over (--skip-bad).

In: problems, in the order of the corpus. Out: nothing or a ConfigError; what was passed over.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.errors import ConfigError, Problem

MOST_PROBLEMS = 20


class TokenizeFailed(Exception):
    """The machine failed, not the input. `problem` says how; no file was written."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.rule)


@dataclass
class Faults:
    """Problems of whole sources, and of single lines, rows or documents, of which `allowed` may be passed over."""

    allowed: int = 0
    sources: list[Problem] = field(default_factory=list)
    lines: list[Problem] = field(default_factory=list)

    @property
    def fatal(self) -> bool:
        return bool(self.sources) or len(self.lines) > self.allowed

    def check(self) -> None:
        """Raises ConfigError when they are fatal, with the first MOST_PROBLEMS."""
        if not self.fatal:
            return
        problems = [*self.sources, *self.lines][:MOST_PROBLEMS]
        if self.allowed and len(self.lines) > self.allowed:
            rule = f"at most so many bad lines, rows or documents are passed over; at least {len(self.lines):,} are bad"
            problems.append(Problem("--skip-bad", self.allowed, rule, "mend them, or allow more"))
        raise ConfigError(problems)

    def skipped(self) -> list[dict[str, str]]:
        """Place and fault of each line, row or document that was passed over."""
        return [{"place": str(problem.got), "rule": problem.rule} for problem in self.lines]
