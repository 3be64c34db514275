"""Which words of a command line name a ladder. In: words. Out: yes or no. It imports nothing: every command asks.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

# What a launch writes into the ladder's folder: the points as they were launched.
RESOLVED = "ladder.json"
_SECTION = re.compile(rb"^ladder\s*:", re.MULTILINE)


def is_ladder(name: str) -> bool:
    """Whether a word of the command line names a ladder: a file with the section, or the folder of a launched one."""
    path = Path(name)
    try:
        if path.is_dir():
            return (path / RESOLVED).is_file()
        return path.is_file() and path.suffix in (".yaml", ".yml") and bool(_SECTION.search(path.read_bytes()))
    except OSError:
        # The command that takes the word for a config or a run says what is wrong with it.
        return False


def positional(words: Sequence[str]) -> Iterator[str]:
    """The words of a command line that are neither options nor key=value."""
    return (word for word in words if not word.startswith("-") and "=" not in word)
