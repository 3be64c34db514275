"""The check for swapping optimizer state to a disk. In: the config. Out: problems; none when the config doesn't swap.

DeepSpeed moves the state with its async_io operator, past the page cache. The operator is compiled where it is first used.

Torch-free.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from configs.errors import Problem
from configs.schema import Config
from pretrain.run.files import storage_problem

# A program with the needs of the operator's sources: Python's headers, libaio's headers, and the library libaio.
_PROGRAM = "#include <Python.h>\n#include <libaio.h>\nint main() { io_context_t context = 0; return io_setup(1, &context); }\n"
_PACKAGES = "install ninja, a C++ compiler, Python's headers and libaio's (Debian: ninja-build g++ python3-dev libaio-dev)"


def check_nvme(config: Config) -> list[Problem]:
    """Problems of the compiler and of the folder zero.nvme_path. Compiles a small program (0.3 s) and opens a file there."""
    zero = config.zero
    if zero.offload == "none" or zero.offload_device != "nvme" or not zero.nvme_path:
        return []
    return [*compiler_problems(), *_folder_problems(zero.nvme_path)]


def compiler_problems() -> list[Problem]:
    """The problem if this machine lacks what DeepSpeed's async_io operator is compiled with."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    missing = [name for name in ("ninja", compiler[0]) if not shutil.which(name)]
    if missing:
        why = f"{' and '.join(missing)} not found"
    else:
        why = _build_error(compiler)
    if not why:
        return []
    rule = f"DeepSpeed compiles its async_io operator here: {why}"
    return [Problem("zero.offload_device", "nvme", rule, f"{_PACKAGES}, or set zero.offload_device=cpu")]


def _build_error(compiler: list[str]) -> str | None:
    """The first error line of the compiler or linker. None: the program was built."""
    with tempfile.TemporaryDirectory() as folder:
        include = sysconfig.get_paths()["include"]
        words = [*compiler, "-I", include, "-x", "c++", "-", "-laio", "-o", str(Path(folder) / "program")]
        done = subprocess.run(words, input=_PROGRAM, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line]
    return (lines or done.stderr.splitlines() or ["the compiler failed"])[0].strip()


def _folder_problems(nvme_path: str) -> list[Problem]:
    key, fix = "zero.nvme_path", "name a folder on a local disk (ext4, xfs)"
    if not Path(nvme_path).is_dir():
        return [Problem(key, nvme_path, "must be an existing folder", "create it, or name another folder")]
    try:
        with tempfile.NamedTemporaryFile(dir=nvme_path) as file:
            descriptor = os.open(file.name, os.O_WRONLY | os.O_DIRECT)
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return [Problem(key, nvme_path, "its file system must take writes past the page cache (O_DIRECT)", fix)]
        return [storage_problem(key, nvme_path, error)]
    return []
