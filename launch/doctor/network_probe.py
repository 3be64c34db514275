"""Measures compute and network speed of a run's nodes: torchrun … network_probe.py --out FILE --sizes-mib 1,16,64.

Out: FILE as JSON. It holds the clock of each node, the time of a fixed matrix product on each node, and the bandwidth of
all-reduce inside each node, between neighbouring nodes and over all ranks. Rank 0 writes FILE after each part, so that the
earlier parts survive if a later part hangs. The probe has no time limit of its own: the caller must set one.

Bus bandwidth is defined as in NCCL's tests: 2 (n-1)/n × bytes / seconds for n ranks. This is what the link of one rank must
carry in one direction, whatever n is. The unit here is Gbit/s, as in the data sheets of network cards.
"""

from __future__ import annotations

import argparse
import os
import runpy
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # torchrun starts this file by its path, as it starts pretrain/main.py, so the finder of our packages is installed here.
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "configs" / "own_packages.py"))

import torch
import torch.distributed as dist

from parallel.runtime import Runtime, start, stop
from pretrain.run.files import write_json
from pretrain.run.process import die_with_parent, node_name

BLOCKS, REPEATS, BLOCK_S = 2, 5, 0.5
PINGS = 8
MATRIX = {"cpu": (512, torch.float32), "cuda": (8192, torch.bfloat16)}
# The products are repeated for this many seconds, so that at least one of them is not interrupted by another process.
PRODUCTS_S = 0.5


@dataclass(frozen=True)
class ProbeWorld:
    """The nodes and their ranks. `names` and `ranks` are ordered by the lowest rank. `node` is the index of this rank's node."""

    runtime: Runtime
    names: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    node: int

    @property
    def local(self) -> int:
        return self.ranks[self.node].index(self.runtime.rank)


def bus_gbit_s(ranks: int, size_bytes: int, seconds: float) -> float:
    """Bus bandwidth in Gbit/s of an all-reduce of `size_bytes` among `ranks` ranks, as NCCL's tests define it."""
    return 2 * (ranks - 1) / ranks * size_bytes * 8 / seconds / 1e9


def ring_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """The edges of a ring of nodes, in rounds. The pairs of one round share no node, so they can be measured at once.

    An even ring has 2 rounds and an odd ring has 3. Two nodes have 1 round and a single node has none.
    """
    if nodes < 2:
        return []
    edges = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else 1)]
    odd_end = edges[-1:] if nodes > 2 and nodes % 2 else []
    ring = edges[: len(edges) - len(odd_end)]
    return [group for group in (ring[0::2], ring[1::2], odd_end) if group]


def find_world(runtime: Runtime) -> ProbeWorld:
    """Gather the node names of all ranks. Every rank must call this function."""
    names: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(names, node_name(os.environ))
    nodes = tuple(dict.fromkeys(names))
    ranks = tuple(tuple(rank for rank, name in enumerate(names) if name == node) for node in nodes)
    return ProbeWorld(runtime, nodes, ranks, nodes.index(names[runtime.rank]))


def _wait(world: ProbeWorld) -> None:
    if world.runtime.is_cuda:
        torch.cuda.synchronize()


def _meet() -> None:
    """Wait for all ranks. The tensor is on the CPU, so gloo carries it."""
    dist.all_reduce(torch.zeros(1))


def _all_reduce_gbit_s(world: ProbeWorld, ranks: Sequence[int], sizes_mib: Sequence[int]) -> dict[str, float]:
    """Size in MiB → bus bandwidth of all-reduce among `ranks` in Gbit/s. Empty for a single rank.

    All ranks of the world must call this function equally often. torch names a group by the number of groups that the
    process has made, and ranks that disagree on the name wait for ever.
    """
    group = dist.group.WORLD
    if len(ranks) < world.runtime.world_size:
        # Only the members make a group. This scales, and several groups can be made at the same time.
        made = dist.new_group(sorted(ranks), use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup), "a rank makes only groups that it is in"
        group = made
    return {str(mib): _one_size_gbit_s(world, group, len(ranks), mib) for mib in sizes_mib} if len(ranks) > 1 else {}


def _one_size_gbit_s(world: ProbeWorld, group: dist.ProcessGroup | None, ranks: int, mib: int) -> float:
    """Bus bandwidth in Gbit/s from the better of two medians, because other load can only slow a measurement down."""
    tensor = torch.zeros(mib << 18, dtype=torch.float32, device=world.runtime.device)
    first_s = min(_timed_all_reduce(world, tensor, group) for _ in range(2))
    slowest = torch.tensor([first_s], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    repeats = max(1, min(REPEATS, int(BLOCK_S / max(float(slowest), 1e-6))))
    times_s = [statistics.median(_timed_all_reduce(world, tensor, group) for _ in range(repeats)) for _ in range(BLOCKS)]
    return round(bus_gbit_s(ranks, tensor.numel() * 4, min(times_s)), 3)


def _timed_all_reduce(world: ProbeWorld, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    begin_s = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    _wait(world)
    return time.perf_counter() - begin_s


def _gather(world: ProbeWorld, value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks."""
    values: list[Any] = [None] * world.runtime.world_size
    dist.all_gather_object(values, value)
    return values


def measure_clocks(world: ProbeWorld) -> list[dict[str, Any]]:
    """The offset of each node's clock from the first node's clock, in seconds.

    The error of an offset is at most `bound_s`, which is half of the quickest round trip.
    """
    rows = [{"node": world.names[0], "offset_s": 0.0, "bound_s": 0.0}]
    for name, ranks in zip(world.names[1:], world.ranks[1:], strict=True):
        if world.runtime.rank == 0:
            bound_s, offset_s = min(_ping(ranks[0]) for _ in range(PINGS))
            rows.append({"node": name, "offset_s": offset_s, "bound_s": bound_s})
        elif world.runtime.rank == ranks[0]:
            for _ in range(PINGS):
                dist.recv(torch.empty(1), 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
    return rows


def _ping(rank: int) -> tuple[float, float]:
    answer = torch.empty(1, dtype=torch.float64)
    begin_s = time.time()
    dist.send(torch.zeros(1), rank)
    dist.recv(answer, rank)
    end_s = time.time()
    return (end_s - begin_s) / 2, float(answer) - (begin_s + end_s) / 2


def measure_compute(world: ProbeWorld) -> list[dict[str, Any]]:
    """The time of a matrix product in seconds, for the slowest rank of each node.

    All ranks multiply at once for half a second. The quickest product of each rank counts.
    """
    size, dtype = MATRIX[world.runtime.device.type]
    left = torch.ones(size, size, dtype=dtype, device=world.runtime.device)
    _meet()
    times_s: list[float] = []
    while sum(times_s) < PRODUCTS_S:
        begin_s = time.perf_counter()
        torch.mm(left, left)
        _wait(world)
        times_s.append(time.perf_counter() - begin_s)
    found = _gather(world, min(times_s))
    return [{"node": name, "product_s": max(found[rank] for rank in ranks)} for name, ranks in zip(world.names, world.ranks)]


def measure_inside(world: ProbeWorld, sizes_mib: Sequence[int]) -> list[dict[str, Any]]:
    """Bandwidth in Gbit/s of all-reduce among the ranks of each node, all nodes at once.

    Nodes with a single rank are left out.
    """
    ranks = world.ranks[world.node]
    found = _gather(world, _all_reduce_gbit_s(world, ranks, sizes_mib))
    return [
        {"node": name, "ranks": len(ranks), "gbit_s": _slowest([found[rank] for rank in ranks])}
        for name, ranks in zip(world.names, world.ranks)
        if len(ranks) > 1
    ]


def measure_between(world: ProbeWorld, sizes_mib: Sequence[int]) -> list[dict[str, Any]]:
    """Bandwidth in Gbit/s of all-reduce between neighbouring nodes. The slowest pair of ranks counts.

    GPU n of one node is paired with GPU n of the other. All pairs run at once, each over its own network card. On CPUs only
    the first rank of each node takes part, because more ranks would measure the cores.
    """
    rows = []
    for edges in ring_rounds(len(world.names)):
        _meet()
        pairs = [pair for edge in edges for pair in zip(world.ranks[edge[0]], world.ranks[edge[1]])]
        if not world.runtime.is_cuda:
            pairs = [(world.ranks[first][0], world.ranks[second][0]) for first, second in edges]
        own = next((pair for pair in pairs if world.runtime.rank in pair), (world.runtime.rank,))
        found = _gather(world, _all_reduce_gbit_s(world, own, sizes_mib))
        for edge in edges:
            parts = [found[rank] for node in edge for rank in world.ranks[node] if found[rank]]
            rows.append({"nodes": [world.names[node] for node in edge], "gbit_s": _slowest(parts)})
    return rows


def measure_all(world: ProbeWorld, sizes_mib: Sequence[int]) -> dict[str, Any]:
    """Bandwidth in Gbit/s of all-reduce over all ranks. The slowest rank counts."""
    ranks = range(world.runtime.world_size)
    return {"ranks": len(ranks), "gbit_s": _slowest(_gather(world, _all_reduce_gbit_s(world, ranks, sizes_mib)))}


def _slowest(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Size in MiB → the smallest bandwidth of the ranks in Gbit/s. Empty if `found` is empty."""
    return {size: min(part[size] for part in found) for size in found[0]} if found else {}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="network_probe.py", description="How fast these ranks' machines compute and talk.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that rank 0 writes")
    parser.add_argument("--sizes-mib", type=lambda text: [int(word) for word in text.split(",")], default=[1, 16, 64])
    found = parser.parse_args(list(argv))
    die_with_parent()
    runtime = start(os.environ)
    world = find_world(runtime)
    sizes: list[int] = found.sizes_mib
    document: dict[str, Any] = {"done": False, "backend": "nccl" if runtime.is_cuda else "gloo", "nodes": list(world.names)}
    parts = {
        "clocks": lambda: measure_clocks(world),
        "compute": lambda: measure_compute(world),
        "inside": lambda: measure_inside(world, sizes),
        "between": lambda: measure_between(world, sizes),
        "all": lambda: measure_all(world, sizes),
    }
    for name, measure in parts.items():
        document[name] = measure()
        document["done"] = name == list(parts)[-1]
        if runtime.rank == 0:
            write_json(found.out, document)
    _meet()
    stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
