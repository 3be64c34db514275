"""Collects the facts of one node, without torch.distributed. In: a `CheckupRequest`. Out: facts as JSON values.

A fact that cannot be found out is None, or its reason. launch/doctor/node_checks.py judges the facts.

Torch-free.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from launch.doctor.disk_facts import disk_facts
from launch.doctor.gpu_facts import gpu_facts
from launch.doctor.request import CheckupRequest
from pretrain.run.files import parse_line

PACKAGES = ("torch", "megatron-core", "deepspeed", "wandb", "transformer-engine", "phalanx")
# The first import over a busy network file system takes minutes.
TORCH_TIMEOUT_S = 120.0

# Runs in a separate process of the ranks' Python: a broken driver may end that process, but not the check-up.
_TORCH = """
import json, time
start = time.perf_counter()
import torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "import_s": round(time.perf_counter() - start, 1),
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None,
    "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
}))
"""


def node_facts(request: CheckupRequest, node: str) -> dict[str, Any]:
    """All facts of this node. Takes some seconds. Faults of the machine are reported as facts and raise nothing."""
    return {
        "node": node,
        "hostname": socket.gethostname(),
        "time_s": time.time(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {name: _version(name) for name in PACKAGES},
        **_address(),
        "memory": memory_facts(),
        "limits": _limits(),
        "interfaces": _interfaces(),
        "files": {"missing": [name for name in request.files if not os.access(name, os.R_OK)]},
        "disk": disk_facts(Path(request.folder), node, request.nonce, request.sizes.disk_mib),
        "gpus": gpu_facts(),
        "torch": torch_facts(),
    }


def torch_facts() -> dict[str, Any]:
    """The versions of torch and the GPUs that it sees. `error` is the last line of output if torch cannot be imported."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, timeout=TORCH_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return {"error": f"import torch took more than {TORCH_TIMEOUT_S:g} s"}
    found = parse_line(done.stdout.splitlines()[-1]) if done.stdout.strip() else None
    if done.returncode or found is None:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return {"error": said[-1] if said else f"import torch ended with exit code {done.returncode}"}
    return {"error": "", **found}


def memory_facts(cgroup: Path = Path("/sys/fs/cgroup"), shm: str = "/dev/shm") -> dict[str, Any]:
    """Memory in GiB. `limit_gib` is the limit of the container or job, or None without one."""
    memory = psutil.virtual_memory()
    limit, used = _cgroup_bytes(cgroup)
    available = memory.available if limit is None else min(memory.available, max(0, limit - used))
    facts: dict[str, Any] = {
        "total_gib": round(memory.total / 2**30, 2),
        "available_gib": round(available / 2**30, 2),
        "limit_gib": None if limit is None else round(limit / 2**30, 2),
    }
    try:
        room = shutil.disk_usage(shm)
    except OSError:
        return {**facts, "shm_free_gib": None}
    return {**facts, "shm_free_gib": round(room.free / 2**30, 2)}


def _cgroup_bytes(root: Path) -> tuple[int | None, int]:
    """(limit, usage without reclaimable page cache) in bytes, of this process's cgroup or the tightest one above it."""
    try:
        rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None, 0
    places = [root / path.lstrip("/") for number, _, path in rows if number == "0"]
    places += [root / "memory" / path.lstrip("/") for _, kinds, path in rows if "memory" in kinds.split(",")]
    found = []
    for place in places:
        for folder in [place, *place.parents]:
            limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            # Version 1 says "no limit" by a number near 2^63.
            if limit is not None and limit < 1 << 60:
                found.append((limit, max(0, used - _inactive_cache(folder))))
            if folder == root:
                break
    return min(found, default=(None, 0), key=lambda pair: pair[0] - pair[1])


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _inactive_cache(folder: Path) -> int:
    try:
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(rows.get("inactive_file", 0))


def _limits() -> dict[str, int | None]:
    """The limits of open files and of locked memory in KiB. None means unlimited."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infinity = resource.RLIM_INFINITY
    return {"open_files": None if files == infinity else files, "locked_kib": None if locked == infinity else locked >> 10}


def _interfaces() -> dict[str, dict[str, Any]]:
    """Each interface's name with its state and its IP addresses."""
    states = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: {
            "up": name in states and states[name].isup,
            "addresses": [entry.address for entry in entries if entry.family in families],
        }
        for name, entries in psutil.net_if_addrs().items()
    }


def _address() -> dict[str, str]:
    """The address of this machine's own host name. gloo needs it where no interface is configured."""
    try:
        return {"address": socket.gethostbyname(socket.gethostname()), "address_error": ""}
    except OSError as error:
        return {"address": "", "address_error": str(error.strerror or error)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
