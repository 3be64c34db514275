"""Tests that make process groups in their own process, and later fork ranks: the groups must outlive the forks.

A forked child has none of their threads and would wait for them for ever, if it were the one that drops the last reference
(Megatron-Core keeps some in caches of functions). Each group of gloo has a thread that wakes up a hundred times a second:
kept groups share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroupGloo, distributed_c10d

from tools.convert import megatron_model

_KEPT: list[Any] = []
_DEVICES: list[Any] = []


def install() -> None:
    """Keep every group that tools.convert.megatron_model makes. A second call in a process does nothing."""
    original = megatron_model.make_groups
    if original.__module__ == __name__:
        return

    def make_groups(*args: Any) -> Any:
        with _one_thread():
            groups = original(*args)
        _KEPT.append((groups, dict(vars(parallel_state)), dist.group.WORLD))
        return groups

    megatron_model.make_groups = make_groups


@contextmanager
def _one_thread() -> Iterator[None]:
    """Groups that are made here share a device, and with it the thread that serves it."""
    if not _DEVICES:
        _DEVICES.append(ProcessGroupGloo.create_default_device())

    class OnTheDevice(ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
            options._devices, options._timeout, options._threads = _DEVICES, timeout, 1
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnTheDevice
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = ProcessGroupGloo
