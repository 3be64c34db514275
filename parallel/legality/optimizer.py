"""Rules of the optimizer. Config in, problems out.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import Problem
from configs.schema import Config
from parallel.legality.rules import reads


@reads("optimizer.kind", "zero")
def muon_keeps_state_in_memory(config: Config) -> Iterator[Problem]:
    """Muon's momentum is in memory, on the device or on the host: never on NVMe."""
    zero = config.zero
    if config.optimizer.kind == "muon" and zero.offload != "none" and zero.offload_device == "nvme":
        rule = "DeepSpeed reads state from NVMe for AdamW's update only, a sub-group at a time; Muon needs whole matrices"
        yield Problem("zero.offload_device", "nvme", rule, "set zero.offload_device=cpu, or optimizer.kind=adamw")


RULES = (muon_keeps_state_in_memory,)
