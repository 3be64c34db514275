"""Where a run's values and code come from. In: the origin of each config value. Out: the dictionary of provenance.json.

Torch-free.
"""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from configs import __version__

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
    """`origin`: dotted key → default, a file's name, or command line. Absent packages are null."""
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
    """`git describe` of the source tree when there is one (-dirty: with changes), else the package's version."""
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
    """The installed version, without importing the package; None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
