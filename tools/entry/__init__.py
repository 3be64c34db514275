"""The console script `phalanx`: installed as the package phalanx_command, a name that no folder of a project shadows.

It has no import of ours at the top: the finder of configs/own_packages.py must stand first.
"""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path


def _home() -> Path:
    """The folder that holds our packages: a checkout, or site-packages."""
    return next(folder for folder in Path(__file__).resolve().parents if (folder / "configs" / "own_packages.py").exists())


runpy.run_path(str(_home() / "configs" / "own_packages.py"))


def main() -> None:
    """Run one command line and exit with its code."""
    importlib.import_module("tools.cli").main()
