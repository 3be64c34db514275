"""Private parts of torch that our code reads, behind functions of ours."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from parallel.compat.private_names import require_names

require_names(__name__)


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of one module, without its children's, that torch puts into a state_dict: (name, tensor)."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def import_dynamo() -> None:
    """Import what torch's optimizers import when the first is made: 0.9 s, which every forked rank would spend again."""
    importlib.import_module("torch._dynamo")


def record_cuda_memory() -> None:
    """From now on each CUDA allocation is recorded with its stack, for `dump_cuda_memory`."""
    torch.cuda.memory._record_memory_history()


def dump_cuda_memory(path: Path) -> None:
    """Write what was recorded, for pytorch.org/memory_viz, and stop recording."""
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
