"""How many copies of a token travel to its experts.

In: a PlannedJob. Out: copies inside the scale-up domain and over the NIC, routing balanced.

Torch-free.
"""

from __future__ import annotations

import numpy as np

from parallel.memory.job import PlannedJob


def remote_copies(job: PlannedJob) -> tuple[float, float]:
    """Copies of a token that travel to its experts: (inside the domain, over the NIC).

    All-to-all sends one for each expert. Flex sends one over the NIC to each other domain that the token has an expert in, and
    inside a domain one to each such rank. All-gather sends one to every rank.
    """
    layout, top_k, domain = job.layout, job.model.moe.top_k, job.machine.domain
    span = layout.expert * layout.expert_tensor
    domains = max(1.0, span / domain)
    if job.dispatcher == "allgather":
        return span / domains - 1, span - span / domains
    if not job.sends_once:
        return top_k * (1 / domains - 1 / layout.expert), top_k * (1 - 1 / domains)
    to_ranks, to_domains = (parts * (1 - _missed(job, parts)) for parts in (layout.expert, domains))
    return to_ranks * (1 - domains / layout.expert), to_domains * (1 - 1 / domains)


def _missed(job: PlannedJob, parts: float) -> float:
    """Probability that none of a token's experts lies in a given one of `parts` equal parts of them. With group-limited routing
    (DeepSeek-V3) its groups are drawn first, then experts from them."""
    moe, router = job.model.moe, job.model.moe.router
    groups, kept = router.num_groups, router.group_top_k
    if not groups or not kept:
        return (1 - 1 / parts) ** moe.top_k
    inside = groups / parts
    if inside <= 1:
        # The part's group isn't chosen, or is and none of its experts here is.
        return 1 - kept / groups * (1 - (1 - inside / kept) ** moe.top_k)
    # No group of the part is among those chosen.
    return float(np.prod([max(0.0, 1 - inside / (groups - drawn)) for drawn in range(kept)]))
