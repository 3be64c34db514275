"""The check that the started ranks match the config: their number and their device.

In: the environment that torchrun sets, and the device that a process found. Out: problems.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from configs.errors import Problem
from configs.schema import Config
from parallel.layout import world_size

# The device through which every CUDA program reaches the driver.
_DRIVER = Path("/dev/nvidiactl")


def check_world(environ: Mapping[str, str], config: Config) -> list[Problem]:
    """A problem when WORLD_SIZE is not launch.nodes × launch.processes_per_node. Without torchrun WORLD_SIZE counts as 1."""
    started, stated = int(environ.get("WORLD_SIZE", 1)), world_size(config)
    if started == stated:
        return []
    nodes, processes = config.launch.nodes, config.launch.processes_per_node
    return [
        Problem(
            "launch.nodes × launch.processes_per_node",
            f"{nodes} × {processes} = {stated}",
            f"must equal the {started} processes that were started",
            f"start {processes} processes on each of {nodes} nodes, or state the {started} that you start",
        )
    ]


def computes_on_cpu(config: Config, environ: Mapping[str, str]) -> bool:
    """Whether it is certain, before the ranks start, that they compute on CPUs.

    With cluster.device = auto it is certain for a local run on a machine that has no NVIDIA driver or hides its GPUs.
    """
    cluster = config.cluster
    if cluster.device == "auto" and cluster.gpu is None and config.launch.target == "local":
        return environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not _DRIVER.exists()
    return cluster.device == "cpu"


def check_device(wanted: str, found: str) -> list[Problem]:
    """A problem when cluster.device differs from the device type that this process found. Both are cpu or cuda."""
    if wanted == "cuda" and found != "cuda":
        return [Problem("cluster.device", "cuda", "needs a CUDA device that this process can see", "set cluster.device=cpu")]
    if wanted == "cpu" and found != "cpu":
        rule = "the GPUs must be hidden before the process starts"
        return [Problem("cluster.device", "cpu", rule, "set CUDA_VISIBLE_DEVICES= (empty) in the environment")]
    return []
