"""Versions of libraries: which one is installed, and which range it lies in.

Torch-free.
"""

from __future__ import annotations

import functools
import re
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path


def numbers_of(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.19.2rc1 gives (0, 19, 2). An unknown version gives an empty tuple."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def is_between(version: str, first: str, last: str | None) -> bool:
    """Is `version` at least `first` and at most `last`? `last` None: there is no end. 0.18 as an end includes 0.18.1."""
    found = numbers_of(version)
    return found >= numbers_of(first) and (last is None or found[: len(numbers_of(last))] <= numbers_of(last))


def installed_version(library: str) -> str:
    """The version of a library that this process would import; "unknown" where it is not installed.

    megatron-core tells its version in a file of its own: a checkout of Megatron-LM may stand before the installed package.
    """
    found = _megatron_source_version() if library == "megatron-core" else None
    if found is not None:
        return found
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "unknown"


def _megatron_source_version() -> str | None:
    """The version in the megatron/core folder that is found first; None: there is no such folder.

    Nothing is imported. A folder that tells no version counts as version 0, which no range of versions has.
    """
    spec = PathFinder.find_spec("megatron", None)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        core = Path(place) / "core"
        if not (core / "__init__.py").exists():
            continue
        try:
            text = (core / "package_info.py").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "0"
        numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) *= *(\d+)", text, re.MULTILINE))
        return ".".join(numbers.get(name, "0") for name in ("MAJOR", "MINOR", "PATCH"))
    return None


@functools.cache
def megatron_version() -> str:
    """The version of megatron-core that this process imports."""
    return installed_version("megatron-core")


def megatron_is_between(first: str, last: str | None = None) -> bool:
    """Is the installed megatron-core at least `first` and at most `last`?"""
    return is_between(megatron_version(), first, last)
