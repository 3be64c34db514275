"""What was started, against what the config states: the number of ranks and their device.

In: the environment that torchrun sets, the device that a process found. Out: problems.

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
    """WORLD_SIZE (1 without torchrun) against launch.nodes × launch.processes_per_node."""
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
    """Is it certain, before the ranks start, that they compute on CPUs?

    cluster.device = auto is certain for a local run on a machine that has no NVIDIA driver, or hides its GPUs.
    """
    cluster = config.cluster
    if cluster.device == "auto" and cluster.gpu is None and config.launch.target == "local":
        return environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not _DRIVER.exists()
    return cluster.device == "cpu"


def check_device(wanted: str, found: str) -> list[Problem]:
    """cluster.device against the device type that this process found: cpu or cuda."""
    if wanted == "cuda" and found != "cuda":
        return [Problem("cluster.device", "cuda", "needs a CUDA device that this process can see", "set cluster.device=cpu")]
    if wanted == "cpu" and found != "cpu":
        rule = "the GPUs must be hidden before the process starts"
        return [Problem("cluster.device", "cpu", rule, "set CUDA_VISIBLE_DEVICES= (empty) in the environment")]
    return []
