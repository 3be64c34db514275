"""Versions of libraries: which one is installed, and which range it lies in.

Torch-free.
"""

from __future__ import annotations

import functools
import re
from importlib import metadata


def numbers_of(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.19.2rc1 gives (0, 19, 2). An unknown version gives an empty tuple."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def is_between(version: str, first: str, last: str | None) -> bool:
    """Is `version` at least `first` and at most `last`? `last` None: there is no end. 0.18 as an end includes 0.18.1."""
    found = numbers_of(version)
    return found >= numbers_of(first) and (last is None or found[: len(numbers_of(last))] <= numbers_of(last))


def installed_version(library: str) -> str:
    """The installed version of a distribution; "unknown" where its metadata is missing."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def megatron_version() -> str:
    """The version of megatron-core that this process imports."""
    return installed_version("megatron-core")


def megatron_is_between(first: str, last: str | None = None) -> bool:
    """Is the installed megatron-core at least `first` and at most `last`?"""
    return is_between(megatron_version(), first, last)
