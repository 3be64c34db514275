"""The corpus that every Python carries: the language reference's topics and the standard library's sources.

In: the running Python. Out: documents (name, UTF-8 text), some 11 MB, in an order that depends on their names only, and
in which every part is like the whole (so that a bounded head, or a held-out tail, is a fair sample).

Torch-free.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "encodings", "pydoc_data"}
"""Folders without prose of their own: installed packages, tests, character tables; pydoc_data comes as topics."""
LARGEST_BYTES = 1 << 18
"""Longer modules are generated tables."""


def documents() -> Iterator[tuple[str, bytes]]:
    """(name, text) in the order of the names' hashes. A venv's Python finds the library of the Python it was made from."""
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
    relative = [path.relative_to(library) for path in library.rglob("*.py")]
    return [path.as_posix() for path in relative if not LEFT_OUT & set(path.parts) and not path.name.startswith("_sysconfigdata")]


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _is_utf8(text: bytes) -> bool:
    """Two or three old modules are Latin-1 by declaration."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
