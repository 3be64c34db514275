"""The measurement between nodes: its formula, its ring, and real ranks that take themselves for several nodes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.doctor.network_probe import (
    bus_gbit_s,
    find_world,
    measure_all,
    measure_between,
    measure_clocks,
    measure_compute,
    measure_inside,
    ring_rounds,
)
from parallel.runtime import Runtime
from tests.ranks import run_ranks


def test_bus_bandwidth_is_what_a_link_must_carry() -> None:
    """As NCCL's tests define it: two ranks send each other everything once; many, everything twice."""
    assert bus_gbit_s(2, 10**9, 1.0) == 8.0
    assert bus_gbit_s(8, 10**9, 2.0) == 7.0


@pytest.mark.parametrize("nodes", range(2, 12))
def test_every_node_meets_both_neighbours_and_one_at_a_time(nodes: int) -> None:
    rounds = ring_rounds(nodes)
    edges = [edge for pairs in rounds for edge in pairs]
    assert len(edges) == len({frozenset(edge) for edge in edges}) == (1 if nodes == 2 else nodes)
    assert all(sum(node in edge for edge in edges) == min(2, nodes - 1) for node in range(nodes))
    assert all(len({node for edge in pairs for node in edge}) == 2 * len(pairs) for pairs in rounds)
    assert ring_rounds(1) == []


def measure() -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ["SLURMD_NODENAME"] = f"n{rank // 2}"
    world = find_world(Runtime(rank, world_size, rank % 2, torch.device("cpu")))
    return {
        "names": world.names,
        "clocks": measure_clocks(world),
        "compute": measure_compute(world),
        "inside": measure_inside(world, [1]),
        "between": measure_between(world, [1]),
        "all": measure_all(world, [1]),
    }


def test_three_nodes_of_two_ranks() -> None:
    found = run_ranks(6, measure)[0]
    assert found["names"] == ("n0", "n1", "n2")
    assert [row["node"] for row in found["clocks"]] == ["n0", "n1", "n2"]
    assert all(abs(row["offset_s"]) <= row["bound_s"] + 1e-3 for row in found["clocks"]), "one machine has one clock"
    assert [row["ranks"] for row in found["inside"]] == [2, 2, 2]
    assert [row["nodes"] for row in found["between"]] == [["n0", "n1"], ["n1", "n2"], ["n2", "n0"]]
    figures = [row["gbit_s"]["1"] for row in [*found["inside"], *found["between"], found["all"]]]
    assert all(figure > 0 for figure in figures) and found["all"]["ranks"] == 6
    assert all(row["product_s"] > 0 for row in found["compute"])
