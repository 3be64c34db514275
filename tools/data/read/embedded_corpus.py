"""The corpus that every Python contains: the topics of the language reference and the sources of the standard library.

In: the running Python. Out: documents (name, UTF-8 text), some 11 MB. Their order depends only on their names and mixes topics
and modules evenly, so that any part (a bounded head, a held-out tail) is a fair sample.

Torch-free.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "encodings", "pydoc_data"}
"""Folders that are left out: installed packages, tests, character tables. pydoc_data is read as topics."""
LARGEST_BYTES = 1 << 18
"""Larger modules are generated tables and are left out."""


def documents() -> Iterator[tuple[str, bytes]]:
    """(name, text) in the order of the hashes of the names. A venv uses the library of the Python that it was made from."""
    library = Path(sysconfig.get_path("stdlib"))
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    modules = {f"module/{name}": library / name for name in _modules(library)}
    for name in sorted([*modules, *(f"topic/{topic}" for topic in topics)], key=_rank):
        if name in modules:
            text = modules[name].read_bytes()
            if len(text) <= LARGEST_BYTES and _is_utf8(text):
                yield name, text
        else:
            yield name, topics[name.removeprefix("topic/")].encode()


def _modules(library: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(library):
        # Installed packages may be far more files than the library.
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        place = Path(folder).relative_to(library)
        found += [(place / name).as_posix() for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    return found


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _is_utf8(text: bytes) -> bool:
    """Whether the text is UTF-8. Two or three old modules declare Latin-1."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
