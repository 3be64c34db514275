"""Tests that make process groups in their own process, and later fork ranks: the groups must outlive the forks.

A forked child has none of their threads and would wait for them for ever, if it were the one that drops the last reference
(Megatron-Core keeps some in caches of functions).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from tools.convert import native

_KEPT: list[Any] = []


def install() -> None:
    """Keep every group that `native` makes, once a process."""
    original = native.make_groups
    if original.__module__ == __name__:
        return

    def make_groups(*args: Any) -> Any:
        groups = original(*args)
        _KEPT.append((groups, dict(vars(parallel_state)), dist.group.WORLD))
        return groups

    native.make_groups = make_groups
