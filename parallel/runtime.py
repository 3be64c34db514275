"""From the environment that torchrun sets to a rank that can talk: device, backend, process group, threads.

In: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Out: `Runtime`, with the default process group up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.beat import BEAT_DIR
from configs.errors import Problem
from parallel import cpu

# How long a rank waits for the others. Where a watchdog looks from outside, it says after launch.watch's times who is late;
# the ranks' own errors, which can't, are then the second line.
TIMEOUT_S, WATCHED_TIMEOUT_S = 600.0, 7200.0


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def read_environment(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank); a single process without torchrun is rank 0 of 1."""
    return int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1)), int(environ.get("LOCAL_RANK", 0))


def check_environment(environ: Mapping[str, str], world_size: int, nodes: int, processes_per_node: int) -> list[Problem]:
    """The started world against the stated one."""
    got = read_environment(environ)[1]
    if got == world_size:
        return []
    return [
        Problem(
            "launch.nodes × launch.processes_per_node",
            f"{nodes} × {processes_per_node} = {world_size}",
            f"must equal the {got} processes that were started",
            f"start {processes_per_node} processes on each of {nodes} nodes, or state the {got} that you start",
        )
    ]


def check_device(wanted: str, device: torch.device) -> list[Problem]:
    """cluster.device against the device that this process found."""
    if wanted == "cuda" and device.type != "cuda":
        return [Problem("cluster.device", "cuda", "needs a CUDA device that this process can see", "set cluster.device=cpu")]
    if wanted == "cpu" and device.type != "cpu":
        rule = "the GPUs must be hidden before the process starts"
        return [Problem("cluster.device", "cpu", rule, "set CUDA_VISIBLE_DEVICES= (empty) in the environment")]
    return []


def start(environ: Mapping[str, str]) -> Runtime:
    """Bring the default process group up: gloo for CPU tensors, NCCL for CUDA tensors.

    Small control messages travel as CPU tensors over gloo also on a GPU, so that they never wait for a stream.
    """
    rank, world_size, local_rank = read_environment(environ)
    device = torch.device("cuda", local_rank) if cpu.cuda_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", 1)))
    if not dist.is_initialized():
        if "MASTER_ADDR" not in environ:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        else:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            timeout_s = WATCHED_TIMEOUT_S if environ.get(BEAT_DIR) else TIMEOUT_S
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    return Runtime(rank, world_size, local_rank, device)


def stop() -> None:
    """Take the process groups down, once all ranks are here: torchrun ends the others when one has left with a code, and
    rank 0 may still be closing W&B.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
