"""Checks of a single node. In: its facts (launch/doctor/node_facts.py) and the request. Out: one `Finding` for each check.

Level `fail`: the run would end or give wrong results. Level `warn`: the run would be slow or might end later. Each
threshold has its reason beside it.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launch.doctor.finding import FAIL, OK, WARN, Finding, graded, level_of
from launch.doctor.gpu_checks import GPU_CHECKS, check_gpu_count
from launch.doctor.request import CheckupRequest

NodeFacts = Mapping[str, Any]
Check = Callable[[NodeFacts, CheckupRequest], Finding]

# A rank's Python process with torch and Megatron-Core uses about 1 GiB before the first weight.
MEMORY_FAIL_GIB, MEMORY_WARN_GIB = 1.0, 2.0
# /dev/shm holds heartbeats and the buffers of the data loader and NCCL. Docker gives 64 MiB by default.
SHM_WARN_GIB, SHM_WARN_GPU_GIB = 0.06, 1.0
# A checkpoint that doesn't fit loses the steps since the last one.
DISK_FAIL_GIB, DISK_WARN_GIB = 1.0, 10.0
INODES_WARN = 10_000
# Slower than this, a checkpoint of a few GiB for each rank takes minutes, and so does starting Python.
DISK_WARN_MIB_S, SMALL_FILE_WARN_MS = 50.0, 20.0
# A rank has a connection to every other rank and some hundred files of its own.
FILES_BASE, FILES_A_RANK = 256, 8
# InfiniBand and RoCE lock the buffers of a transfer into memory.
LOCKED_WARN_KIB = 64 << 20
TORCH_IMPORT_WARN_S = 30.0


def check_torch(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Fails if torch can't be imported; warns if the import takes longer than TORCH_IMPORT_WARN_S."""
    torch = facts["torch"]
    where = facts["python"]["executable"]
    if torch["error"]:
        fix = f"make {where} import torch there: launch.slurm.python, launch.slurm.modules or launch.slurm.container"
        return Finding("torch", FAIL, torch["error"], "import torch works", fix)
    level = WARN if torch["import_s"] > TORCH_IMPORT_WARN_S else OK
    fix = "every start of a rank takes this long: put the Python environment on a faster file system, or into a container image"
    value = f"{torch['version']}, imported in {torch['import_s']:g} s"
    return graded("torch", level, value, f"imported within {TORCH_IMPORT_WARN_S:g} s", fix)


def check_packages(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Fails if a package that the run needs is missing."""
    missing = [name for name in request.packages if not facts["packages"].get(name)]
    fix = f"install them for {facts['python']['executable']} (pip install -c constraints.txt), or name another Python"
    expected = "installed: " + ", ".join(request.packages)
    value = "missing: " + ", ".join(missing) if missing else "installed"
    return graded("packages", FAIL if missing else OK, value, expected, fix)


def check_disk(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Fails if the run folder is not writable or not shared by all nodes; warns if little space or few inodes are free."""
    disk = facts["disk"]
    expected = f"writable, the same on every node, {DISK_WARN_GIB:g} GiB free"
    if disk["error"]:
        return Finding("run folder", FAIL, disk["error"], expected, "choose a run.dir on a file system that all nodes mount")
    if not disk["same"]:
        fix = "choose a run.dir on a shared file system; local folders of the same name are not one folder"
        return Finding("run folder", FAIL, f"{disk['path']} is another folder here", expected, fix)
    free, inodes = disk["free_gib"], disk["free_inodes"]
    few = inodes is not None and inodes < INODES_WARN
    level = level_of(fails=free < DISK_FAIL_GIB, warns=free < DISK_WARN_GIB or few)
    value = f"{free:g} GiB free" + (f", {inodes} files more" if few else "")
    return graded("run folder", level, value, expected, "free some space, keep fewer checkpoints, or choose another run.dir")


def check_disk_speed(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Warns if the run folder's file system is slower than DISK_WARN_MIB_S or SMALL_FILE_WARN_MS."""
    disk = facts["disk"]
    expected = f"at least {DISK_WARN_MIB_S:g} MiB/s, a small file within {SMALL_FILE_WARN_MS:g} ms"
    if disk["error"] or "write_mib_s" not in disk:
        return Finding("disk speed", OK, "not measured", expected)
    slow = min(disk["write_mib_s"], disk["read_mib_s"]) < DISK_WARN_MIB_S or disk["small_file_ms"] > SMALL_FILE_WARN_MS
    value = f"{disk['write_mib_s']:.0f} MiB/s written, {disk['read_mib_s']:.0f} read, {disk['small_file_ms']:.2g} ms a small file"
    fix = "choose a faster file system for run.dir; checkpoint.asynchronous=true lets training go on meanwhile"
    return graded("disk speed", WARN if slow else OK, value, expected, fix)


def check_files(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Fails if data or tokenizer can't be read."""
    missing = facts["files"]["missing"]
    value = (
        f"{len(missing)} of {len(request.files)} can't be read, first {missing[0]}" if missing else f"{len(request.files)} there"
    )
    fix = "put data and tokenizer where every node reads them under this path"
    return graded("data", FAIL if missing else OK, value, "data and tokenizer are readable", fix)


def check_memory(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Fails below MEMORY_FAIL_GIB of available memory a rank; warns below MEMORY_WARN_GIB."""
    memory, ranks = facts["memory"], request.processes_per_node
    share = memory["available_gib"] / ranks
    level = level_of(fails=share < MEMORY_FAIL_GIB, warns=share < MEMORY_WARN_GIB)
    limit = f" under a limit of {memory['limit_gib']:g}" if memory["limit_gib"] is not None else ""
    value = f"{memory['available_gib']:.1f} GiB available{limit} of {memory['total_gib']:.1f}, {share:.1f} a rank"
    fix = "find what holds the memory (ps aux --sort -rss), or ask for more: launch.slurm.mem"
    return graded("memory", level, value, f"{MEMORY_WARN_GIB:g} GiB a rank", fix)


def check_shared_memory(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Warns if /dev/shm is missing or has less free space than the ranks may need."""
    free, least = facts["memory"]["shm_free_gib"], SHM_WARN_GPU_GIB if request.wants_gpus else SHM_WARN_GIB
    value = "none" if free is None else f"{free:.2f} GiB free"
    fix = "remove what dead processes left in /dev/shm; in a container raise it (docker --shm-size, or mount the host's)"
    return graded("/dev/shm", WARN if free is None or free < least else OK, value, f"{least:g} GiB", fix)


def check_open_files(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Warns if the limit of open files is too low for the run's number of ranks."""
    limit = facts["limits"]["open_files"]
    least = FILES_BASE + FILES_A_RANK * request.nodes * request.processes_per_node
    fix = f"raise it in launch.slurm.prologue (ulimit -n {least}), or in the site's limits"
    value = "unlimited" if limit is None else str(limit)
    return graded("open files", WARN if limit is not None and limit < least else OK, value, f"{least} for this world", fix)


def check_locked_memory(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Warns if the limit of locked memory is too low for InfiniBand."""
    limit = facts["limits"]["locked_kib"]
    matters = request.wants_gpus and request.nodes > 1
    low = matters and limit is not None and limit < LOCKED_WARN_KIB
    value = "unlimited" if limit is None else f"{limit / 2**20:.2g} GiB"
    fix = "ulimit -l unlimited in launch.slurm.prologue, or PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
    expected = "64 GiB or unlimited, for InfiniBand" if matters else "any, without GPUs over several nodes"
    return graded("locked memory", WARN if low else OK, value, expected, fix)


def check_interface(facts: NodeFacts, request: CheckupRequest) -> Finding:
    """Fails if cluster.interface, or without it the host's own address, can't be used between nodes."""
    found: Mapping[str, Any] = facts["interfaces"]
    here = ", ".join(sorted(name for name, entry in found.items() if entry["up"] and entry["addresses"]))
    if request.interface is None:
        fix = f"name the interface that the nodes share: cluster.interface, here one of {here}"
        bad = bool(facts["address_error"]) and request.nodes > 1
        value = f"{facts['hostname']} is {facts['address'] or 'unknown: ' + facts['address_error']}"
        return graded("network interface", FAIL if bad else OK, value, "the host knows its own name's address", fix)
    fix = f"set cluster.interface to one that every node has; here: {here}"
    expected = f"{request.interface} is up and has an address"
    wrong = [why for name in request.interface.split(",") if (why := _interface_fault(name, found))]
    return graded("network interface", FAIL if wrong else OK, "; ".join(wrong) or "up", expected, fix)


def _interface_fault(name: str, found: Mapping[str, Any]) -> str:
    """Why the interface cannot be used, or an empty text.

    NCCL also accepts =NAME, a prefix, NAME:PORT, and ^NAME for all others. A name with ^ is not checked.
    """
    if name.startswith("^"):
        return ""
    plain = name.lstrip("=").partition(":")[0]
    entries = [found[plain]] if plain in found else [entry for other, entry in found.items() if other.startswith(plain)]
    if not entries:
        return f"there is no {plain}"
    if not any(entry["up"] for entry in entries):
        return f"{plain} is down"
    return "" if any(entry["up"] and entry["addresses"] for entry in entries) else f"{plain} has no address"


NODE_CHECKS: tuple[Check, ...] = (
    check_torch, check_packages, check_disk, check_disk_speed, check_files, check_memory, check_shared_memory,
    check_open_files, check_locked_memory, check_interface, *GPU_CHECKS,
)  # fmt: skip
# A node that fails one of these checks cannot take part in the network measurement.
NEEDED_FOR_NETWORK: tuple[Check, ...] = (check_torch, check_interface, check_gpu_count)


def check_node(facts: NodeFacts, request: CheckupRequest) -> list[Finding]:
    """Every check of one node, in the order of the report."""
    return [check(facts, request) for check in NODE_CHECKS]


def can_join_network_probe(facts: NodeFacts, request: CheckupRequest) -> bool:
    """Can this node's ranks be started for the network measurement?"""
    return all(check(facts, request).level != FAIL for check in NEEDED_FOR_NETWORK)
