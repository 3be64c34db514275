"""`phalanx bench [NAME]`: measurements that compare side by side in one run. In: a name and its own words. Out: ratios.

Torch-free.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from configs.errors import ConfigError, Problem


@dataclass(frozen=True)
class Bench:
    """A measurement's module, whose `main(argv)` runs it, and what stands beside what."""

    module: str
    summary: str


BENCHES = {
    "step": Bench("tools.bench.step", "CPU time of a training step beside a bare Megatron-Core loop, same model"),
    "checkpoint": Bench("tools.bench.checkpoint", "how long a save stalls training: asynchronous beside synchronous"),
    "tokenize": Bench("tools.bench.tokenize", "`phalanx data tokenize` beside sentencepiece's own threads, same text"),
    "convert": Bench("tools.bench.convert", "import and export beside a copy of the same files, with peak memory"),
}


def help_text() -> str:
    """What `phalanx bench` prints."""
    width = max(map(len, BENCHES))
    lines = ["usage: phalanx bench NAME [its own words; NAME --help shows them]", "", "Each compares side by side in one run:"]
    return "\n".join([*lines, *(f"  {name:<{width}}  {bench.summary}" for name, bench in BENCHES.items())])


def main(argv: list[str]) -> int:
    """Run one measurement; without a name list them. Raises ConfigError for a name that isn't there."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, words = argv[0], argv[1:]
    if name not in BENCHES:
        raise ConfigError(Problem("NAME", name, f"must be one of {', '.join(BENCHES)}", "see phalanx bench"))
    importlib.import_module(BENCHES[name].module).main(words)
    return 0
