"""Our five packages come from this installation, whatever else is named like them. Also the way to start one of our modules.

A project's own folder `tools`, `configs` or `launch` on PYTHONPATH comes before installed packages. The finder here is asked
first, for our five names only: it changes nothing about where other libraries come from.

    python -P …/configs/own_packages.py MODULE ARGUMENT …     runs MODULE as python -m does, with the finder in place

This file runs by its path, before any package of ours can be imported: standard library only, no import of ours.

Torch-free.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

NAMES = ("configs", "parallel", "pretrain", "launch", "tools")
ROOT = Path(__file__).resolve().parents[1]
STARTER = str(ROOT / "configs" / "own_packages.py")


class OwnPackages(MetaPathFinder):
    """Finds our top-level packages under ROOT; what lies inside them is then found by their own paths."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of one of NAMES; None for every other name: the next finder is asked."""
        return PathFinder.find_spec(fullname, [str(ROOT)]) if fullname in NAMES else None


def install() -> None:
    """Put the finder first, once a process, and take a folder of ours off sys.path: its rooms are named data, model, run …"""
    if not any(type(finder).__name__ == OwnPackages.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackages())
    rooms = {str(ROOT / name) for name in NAMES}
    sys.path[:] = [entry for entry in sys.path if entry not in rooms]


def command(python: str, module: str) -> list[str]:
    """The words that start a module of ours in a process of its own. -P: nothing is taken from the working folder."""
    return [python, "-P", STARTER, module]


install()
if __name__ == "__main__":
    if os.environ.pop("PYTHONINSPECT", ""):
        # Python would wait for input at the end and then return 0, whatever exit code the module asked for.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    del sys.argv[0]
    # run_module puts the module's own path into argv[0].
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
