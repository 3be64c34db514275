"""`phalanx bench [NAME]`: measurements that compare two implementations in one run.

In: a name and the measurement's own arguments. Out: ratios.

Torch-free.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from configs.errors import ConfigError, Problem


@dataclass(frozen=True)
class Bench:
    """The module of a measurement, whose `main(argv)` runs it, and a summary of what it compares."""

    module: str
    summary: str


BENCHES = {
    "step": Bench("tools.bench.step", "CPU time of a training step, compared with a bare Megatron-Core loop"),
    "checkpoint": Bench("tools.bench.checkpoint", "how long a save stalls training: asynchronous compared with synchronous"),
    "tokenize": Bench("tools.bench.tokenize", "`phalanx data tokenize`, compared with sentencepiece's own threads"),
    "convert": Bench("tools.bench.convert", "speed and peak memory of import and export, compared with a file copy"),
    "search": Bench("tools.bench.search", "CPU time of a search for layouts of 16,384 and 100,352 GPUs, compared with its limit"),
    "start": Bench("tools.bench.start", "time, CPU and file opens of a launch to step 1: forked ranks, compared with plain ones"),
}


def help_text() -> str:
    """The text of `phalanx bench` without a name."""
    width = max(map(len, BENCHES))
    lines = [
        "usage: phalanx bench NAME [arguments of NAME; see phalanx bench NAME --help]",
        "",
        "Each measurement compares its sides in one run:",
    ]
    return "\n".join([*lines, *(f"  {name:<{width}}  {bench.summary}" for name, bench in BENCHES.items())])


def main(argv: list[str]) -> int:
    """Run one measurement; without a name list them all. Raises ConfigError for an unknown name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, words = argv[0], argv[1:]
    if name not in BENCHES:
        raise ConfigError(Problem("NAME", name, f"must be one of {', '.join(BENCHES)}", "see phalanx bench"))
    importlib.import_module(BENCHES[name].module).main(words)
    return 0
