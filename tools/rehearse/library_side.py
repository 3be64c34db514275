"""One side of a comparison of libraries: what an interpreter runs, and which guards its versions need.

Torch-free.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parallel.compat.index import needed_guards
from pretrain.run.provenance import package_version

# The libraries that decide the numbers of a training step.
LIBRARIES = ("torch", "megatron-core", "deepspeed", "numpy")


@dataclass(frozen=True)
class LibrarySide:
    """`versions`: library -> version, or an empty string where it is not installed. `guards`: the guards that are on."""

    versions: dict[str, str]
    guards: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def this_side() -> LibrarySide:
    """The side of the interpreter that runs this."""
    versions = {name: package_version(name) or "" for name in LIBRARIES}
    return LibrarySide({"python": platform.python_version(), **versions}, needed_guards(versions))


def side_of(answer: Mapping[str, Any]) -> LibrarySide:
    """The side that another interpreter told."""
    return LibrarySide(dict(answer["versions"]), tuple(answer["guards"]))


def describe_sides(here: LibrarySide, there: LibrarySide) -> list[str]:
    """Both sides as lines: the versions in two columns, then the guards that are on at one side only."""
    rows = [("", "here", "there"), *((name, here.versions[name], there.versions.get(name, "")) for name in here.versions)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{name:<{widths[0]}}  {one or 'none':<{widths[1]}}  {other or 'none'}".rstrip() for name, one, other in rows]
    lines[0] = lines[0].replace("none", " " * 4)
    for side, guards, others in (("here", here.guards, there.guards), ("there", there.guards, here.guards)):
        lines += [f"guard on {side} only: {guard}" for guard in guards if guard not in others]
    return lines
