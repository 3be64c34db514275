"""Checks of one node's GPUs. In: the node's facts and the request. Out: one `Finding` for each check.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from launch.doctor.finding import FAIL, OK, WARN, Finding, graded, level_of
from launch.doctor.request import CheckupRequest

# Driver and display use less than this on an idle GPU. More belongs to another process.
IDLE_MIB = 2048


def check_gpu_count(facts: Mapping[str, Any], request: CheckupRequest) -> Finding:
    """Fails with fewer GPUs than ranks; warns with fewer than cluster.gpus_per_node."""
    seen, listed = len(facts["torch"].get("gpus", ())), len(facts["gpus"]["gpus"])
    value = f"torch sees {seen}, nvidia-smi lists {listed}"
    if not request.wants_gpus:
        bad = request.device == "cpu" and seen > 0
        fix = "set CUDA_VISIBLE_DEVICES= (empty) in launch.env, or cluster.device=cuda"
        expected = "none: cluster.device=cpu" if bad else "no GPU is asked for"
        return graded("GPUs", FAIL if bad else OK, value, expected, fix)
    expected = f"{request.processes_per_node} for the ranks, {request.gpus_per_node} a node (cluster.gpus_per_node)"
    level = level_of(fails=seen < request.processes_per_node, warns=max(seen, listed) < request.gpus_per_node)
    why = f" ({facts['gpus']['error']})" if facts["gpus"]["error"] else ""
    if listed > seen and level == FAIL:
        fix = "ask for the GPUs (launch.slurm.gpus_per_node), and install a torch built for this driver's CUDA"
    else:
        fix = "keep the node out (launch.slurm.exclude) and tell its administrators: a GPU fell off, or was never there"
    return graded("GPUs", level, value + why, expected, fix)


def check_gpu_kind(facts: Mapping[str, Any], request: CheckupRequest) -> Finding:
    """H100-SXM-80GB names a H100: the family must be a word of the driver's name (NVIDIA H100 80GB HBM3)."""
    names = sorted({row["name"] for row in facts["gpus"]["gpus"]} or set(facts["torch"].get("gpus", ())))
    if request.gpu is None or not names:
        return Finding("GPU kind", OK, ", ".join(names) or "none", "any" if request.gpu is None else request.gpu)
    family = re.split(r"[-\s]", request.gpu)[0].lower()
    other = [name for name in names if family not in re.split(r"[-\s]", name.lower())]
    fix = "choose the right partition or constraint (launch.slurm.constraint), or state the GPU: cluster.gpu"
    return graded("GPU kind", WARN if other else OK, ", ".join(other or names), request.gpu, fix)


def check_gpu_health(facts: Mapping[str, Any], request: CheckupRequest) -> Finding:
    """Fails at uncorrected memory errors; warns at throttling and other faults."""
    faults = [f"GPU {row['index']}: {text}" for row in facts["gpus"]["gpus"] for text in _faults(row)]
    broken = any("memory error" in fault for fault in faults)
    fix = "keep the node out (launch.slurm.exclude) and tell its administrators"
    expected = "no uncorrected memory errors, not slowed down by heat or power"
    level = level_of(fails=broken, warns=bool(faults))
    return graded("GPU health", level, "; ".join(faults) or "no faults", expected, fix)


def _faults(row: Mapping[str, Any]) -> list[str]:
    faults = []
    if row.get("uncorrected_errors"):
        faults.append(f"{row['uncorrected_errors']} uncorrected memory errors since the driver started")
    if row.get("rows_pending"):
        faults.append("memory pages wait for a reset to be retired")
    if row.get("hot"):
        faults.append(f"slowed down by heat ({row.get('celsius')} °C)")
    if row.get("power_brake"):
        faults.append("slowed down by the power supply")
    return faults


def check_gpu_memory(facts: Mapping[str, Any], request: CheckupRequest) -> Finding:
    """Warns if other processes hold more than IDLE_MIB of a GPU's memory."""
    held = {row["index"]: row["used_mib"] for row in facts["gpus"]["gpus"] if (row["used_mib"] or 0) > IDLE_MIB}
    value = "; ".join(f"GPU {index}: {used / 1024:.1f} GiB in use" for index, used in held.items()) or "free"
    fix = "end what runs there (nvidia-smi shows it); a dead process that still holds memory needs a reset of the GPU"
    return graded("GPU memory", WARN if held else OK, value, f"less than {IDLE_MIB / 1024:g} GiB in use", fix)


GPU_CHECKS = (check_gpu_count, check_gpu_kind, check_gpu_health, check_gpu_memory)
