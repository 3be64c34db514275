"""The sources of a blend by name, for losses of their own. In: the config. Out: names, and the name that each part counts under.

Torch-free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config
from pretrain.data.streams import source_paths, train_phases

OTHER = "other"


@dataclass(frozen=True)
class ShownSources:
    """`names`: of the losses, without "loss/". `slots`: for each part of the training stream, the index of its name."""

    names: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()


def source_names(config: Config) -> list[str]:
    """A name for each source: the last part of its path; `_2`, `_3` … where several have the same."""
    found: list[str] = []
    for path in source_paths(config.data):
        name = re.sub(r"[^\w.-]", "_", Path(path).name)
        number = 1
        while (f"{name}_{number}" if number > 1 else name) in found:
            number += 1
        found.append(f"{name}_{number}" if number > 1 else name)
    return found


def shown_sources(config: Config) -> ShownSources:
    """The metrics.source_losses sources of the largest shares in any phase, and one name for all others.

    Nothing is shown for a single source, whose loss is the loss.
    """
    names, shown = source_names(config), config.metrics.source_losses
    if len(names) < 2 or not shown:
        return ShownSources()
    shares = dict.fromkeys(source_paths(config.data), 0.0)
    for _, blend in train_phases(config):
        total = sum(part.weight for part in blend)
        for part in blend:
            shares[part.path] = max(shares[part.path], part.weight / total)
    ranked = sorted(range(len(names)), key=lambda part: -list(shares.values())[part])
    own = sorted(ranked[:shown])
    kept = [names[part] for part in own]
    if len(own) == len(names):
        return ShownSources(tuple(kept), tuple(range(len(names))))
    other = OTHER if OTHER not in kept else f"{OTHER}_sources"
    return ShownSources((*kept, other), tuple(own.index(part) if part in own else len(own) for part in range(len(names))))
