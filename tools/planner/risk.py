"""What may make a layout slower, or larger, than its plan says.

In: a plan. Out: a `Risk`.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.memory.job import PlannedJob
from tools.planner.planning import Plan

LAUNCHES = ("kernels", "expert_kernels", "passes")


@dataclass(frozen=True)
class Risk:
    """Shares of a step: `nic` is spent on traffic between scale-up domains, `launches` on the host, which launches kernels.
    `memory_free`: share of the GPU's usable memory that the fullest rank leaves free."""

    nic: float
    launches: float
    memory_free: float

    def as_dict(self) -> dict[str, float]:
        return {"nic": round(self.nic, 4), "launches": round(self.launches, 4), "memory_free": round(self.memory_free, 4)}


def nic_kinds(job: PlannedJob) -> set[str]:
    """The kinds of work of step_cost.py that travel over the NIC, or partly so."""
    layout, domain = job.layout, job.machine.domain
    over = {"expert_far"}
    over |= {"tensor"} if max(layout.tensor, layout.expert_tensor) > domain else set()
    over |= {"context"} if layout.tensor * layout.context > domain else set()
    over |= {"pipeline"} if layout.pipeline > 1 and layout.world_size // layout.pipeline >= domain else set()
    groups = ((layout.data * layout.context, layout.tensor), (layout.expert_data, layout.expert * layout.expert_tensor))
    return over | (
        {"data", "data_beside", "shards"}
        if any(members > 1 and members * stride > domain for members, stride in groups)
        else set()
    )


def risk_of(plan: Plan) -> Risk:
    """The risk of a plan."""
    seconds, step_s = plan.timing.breakdown_s, plan.timing.step_s
    nic, launches = (sum(seconds.get(kind, 0.0) for kind in kinds) / step_s for kinds in (nic_kinds(plan.job), LAUNCHES))
    return Risk(nic, launches, 1 - plan.ledger.peak_gib / plan.ledger.capacity_gib)
