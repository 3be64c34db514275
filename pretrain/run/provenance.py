"""The origin of a run's config values and code. In: the origin of each config value. Out: the content of provenance.json.

Torch-free.
"""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs import __version__
from parallel.compat.versions import installed_version

PACKAGES = (
    "phalanx",
    "torch",
    "megatron-core",
    "deepspeed",
    "transformer-engine",
    "numpy",
    "omegaconf",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "wandb",
)


def make_provenance(origin: Mapping[str, str]) -> dict[str, Any]:
    """The content of provenance.json. `origin`: dotted key → default, a file's name, or command line.

    The version of a package that is not installed is null.
    """
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "code_version": code_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "origin": dict(origin),
    }


def code_version() -> str:
    """The output of `git describe` where the source tree is a git checkout, with -dirty for uncommitted changes.

    Elsewhere it is the package's version.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return __version__
        if found.returncode == 0:
            return found.stdout.strip()
    return __version__


def package_version(package: str) -> str | None:
    """The package's version, read without importing it. None: the package is not installed."""
    version = installed_version(package)
    return None if version == "unknown" else version
