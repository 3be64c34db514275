"""From the environment that torchrun sets to a rank that can talk: device, backend, process group, threads.

In: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Out: `Runtime`, with the default process group up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.errors import ConfigError
from parallel.compat import megatron_cpu as cpu
from parallel.environment import check_environment, num_threads

# How long a rank waits for the others in a collective.
TIMEOUT_S, WATCHED_TIMEOUT_S = 600.0, 7200.0


@dataclass(frozen=True)
class Runtime:
    """This rank's place: its number in the world and on its machine, and its device."""

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


def start(environ: Mapping[str, str], is_watched: bool = False) -> Runtime:
    """Bring the default process group up: gloo for CPU tensors, NCCL for CUDA tensors.

    `is_watched`: a watchdog outside ends what hangs, and names the rank; the ranks' own limit is then the second line.
    Small control messages travel as CPU tensors over gloo also on a GPU, so that they never wait for a stream.
    Raises ConfigError if the environment lets no rank start (parallel/environment.py).
    """
    if problems := check_environment(environ):
        raise ConfigError(problems)
    rank, world_size, local_rank = read_environment(environ)
    device = torch.device("cuda", local_rank) if cpu.cuda_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(num_threads(environ))
    if not dist.is_initialized():
        if "MASTER_ADDR" not in environ:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        else:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            timeout_s = WATCHED_TIMEOUT_S if is_watched else TIMEOUT_S
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    return Runtime(rank, world_size, local_rank, device)


def stop() -> None:
    """Take the process groups down, once all ranks are here: torchrun ends the others when one has left with a code, and
    rank 0 may still be closing W&B.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
