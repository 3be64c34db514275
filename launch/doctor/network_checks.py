"""Checks that compare nodes with each other and with the cluster file.

In: the facts of all nodes and the measurements of the network. Out: findings of each node.
A slow node can only be recognised beside its peers. The thresholds here are therefore ratios to the median or to the
upper quartile.

Torch-free.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.doctor.finding import FAIL, OK, WARN, Finding, graded, level_of
from launch.doctor.node_checks import NodeFacts
from launch.doctor.request import CheckupRequest
from pretrain.run.lock import SILENCE_S

NodeFindings = Iterator[tuple[str, Finding]]

# Ranks with different versions of these packages cannot communicate or compute different results.
_MUST_AGREE = ("torch", "megatron-core", "deepspeed", "transformer-engine", "phalanx", "NCCL", "CUDA")
_SHOULD_AGREE = ("Python", "wandb", "GPU driver")
CLOCK_WARN_S = 1.0
# Below a half something is wrong; below a quarter it holds the whole job at its speed.
SLOW_WARN, SLOW_FAIL = 0.5, 0.25
MEMORY_WARN = 0.9


def versions_of(facts: NodeFacts) -> dict[str, str]:
    """The versions of a node's packages, Python, NCCL, CUDA and GPU driver, by name; `none` where one is missing."""
    gpus = facts["gpus"]["gpus"]
    found = {**facts["packages"], "Python": facts["python"]["version"]}
    found |= {"NCCL": facts["torch"].get("nccl"), "CUDA": facts["torch"].get("cuda")}
    found["GPU driver"] = gpus[0]["driver"] if gpus else None
    return {name: value or "none" for name, value in found.items()}


def check_versions(nodes: Mapping[str, NodeFacts]) -> NodeFindings:
    """Nodes whose versions differ from those of most nodes."""
    versions = {node: versions_of(facts) for node, facts in nodes.items()}
    names = (*_MUST_AGREE, *_SHOULD_AGREE)
    usual = {name: Counter(found[name] for found in versions.values()).most_common(1)[0][0] for name in names}
    for node, found in versions.items():
        odd = [name for name in names if found[name] != usual[name]]
        level = level_of(fails=bool(set(odd) & set(_MUST_AGREE)), warns=bool(odd))
        value = ", ".join(f"{name} {found[name]}" for name in odd) or "as the other nodes"
        expected = ", ".join(f"{name} {usual[name]}" for name in odd) or "the same on every node"
        fix = "start every node with one environment: a shared file system, a container image, or the same modules"
        yield node, graded("versions", level, value, expected, fix)


def check_memory_size(nodes: Mapping[str, NodeFacts]) -> NodeFindings:
    """A node with less memory than the others has lost a module of it."""
    usual = statistics.median(facts["memory"]["total_gib"] for facts in nodes.values())
    for node, facts in nodes.items():
        total = facts["memory"]["total_gib"]
        level = WARN if total < MEMORY_WARN * usual else OK
        fix = "keep the node out (launch.slurm.exclude) and tell its administrators, or the smallest node sets the limit"
        expected = f"{MEMORY_WARN:.0%} of the median, {usual:.1f} GiB"
        yield node, graded("memory size", level, f"{total:.1f} GiB", expected, fix)


def check_clocks(network: Mapping[str, Any]) -> NodeFindings:
    """Each node's clock against the median clock. The uncertainty of the round trip counts in the node's favour."""
    rows: Sequence[Mapping[str, Any]] = network.get("clocks", ())
    if len(rows) < 2:
        return
    usual = statistics.median_low(row["offset_s"] for row in rows)
    for row in rows:
        offset_s, bound_s = row["offset_s"] - usual, row["bound_s"]
        sure_s = max(0.0, abs(offset_s) - bound_s)
        level = level_of(fails=sure_s > SILENCE_S, warns=sure_s > CLOCK_WARN_S)
        value = f"{1e3 * offset_s:+.1f} ms ± {1e3 * bound_s:.1f}" if abs(offset_s) < 1 else f"{offset_s:+.1f} s"
        fix = "have the node's clock set (chronyc tracking); from 20 s on, a live run folder may be taken for a dead one"
        yield row["node"], graded("clock", level, value, f"within {CLOCK_WARN_S:g} s of the other nodes", fix)


def check_compute(network: Mapping[str, Any], request: CheckupRequest) -> NodeFindings:
    """The fastest matrix product on each node's slowest rank, against the median node."""
    rows: Sequence[Mapping[str, Any]] = network.get("compute", ())
    if len(rows) < 2:
        return
    usual = statistics.median_low(row["product_s"] for row in rows)
    for row in rows:
        ratio = row["product_s"] / usual
        level = level_of(fails=ratio >= 2 * request.slow_ratio, warns=ratio >= request.slow_ratio)
        expected = f"less than {request.slow_ratio:g} times the median, {1e3 * usual:.3g} ms (launch.watch.straggler_ratio)"
        fix = "look for other processes, heat or a power limit on that node, or keep it out: launch.slurm.exclude"
        yield row["node"], graded("compute", level, f"{1e3 * row['product_s']:.3g} ms, {ratio:.2f} times", expected, fix)


def gbit_s(row: Mapping[str, Any]) -> float:
    """The bandwidth in Gbit/s of a connection: the best over all message sizes. 0 where nothing was measured."""
    return max(row["gbit_s"].values(), default=0.0)


def good_gbit_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """The upper quartile of the connections in Gbit/s, because one slow node slows two edges of a small ring."""
    ordered = sorted(map(gbit_s, rows))
    return ordered[math.ceil(0.75 * (len(ordered) - 1))]


def check_neighbours(network: Mapping[str, Any]) -> NodeFindings:
    """A node that is slow with all of its neighbours is slow itself. Two good nodes with a slow edge have a bad connection."""
    edges: Sequence[Mapping[str, Any]] = network.get("between", ())
    if len(edges) < 3:
        # Two nodes have a single connection. Only the cluster file gives a figure to compare it with.
        return
    good = good_gbit_s(edges)
    best = {node: max(gbit_s(edge) for edge in edges if node in edge["nodes"]) for node in network["nodes"]}
    expected = f"{SLOW_WARN:.0%} of {good:.1f} Gbit/s, the upper quartile of all connections"
    slow_nodes = [node for node in best if best[node] < SLOW_WARN * good]
    for node, found in best.items():
        slowest_edge = min((edge for edge in edges if node in edge["nodes"]), key=gbit_s)
        other = next(name for name in slowest_edge["nodes"] if name != node)
        if node in slow_nodes:
            level = FAIL if found < SLOW_FAIL * good else WARN
            fix = "keep the node out (launch.slurm.exclude) and have its network card, cable and interface looked at"
            yield node, Finding("network", level, f"{found:.1f} Gbit/s at best with its neighbours", expected, fix)
        elif gbit_s(slowest_edge) < SLOW_WARN * good and other not in slow_nodes:
            fix = f"have the connection between {node} and {other} checked (switch, cable); both nodes are fast with other nodes"
            yield node, Finding("network", WARN, f"{gbit_s(slowest_edge):.1f} Gbit/s with {other}", expected, fix)
        else:
            yield node, Finding("network", OK, f"{found:.1f} Gbit/s", expected)


def check_inside(network: Mapping[str, Any]) -> NodeFindings:
    """All-reduce among a node's own ranks, against the median node: a broken NVLink or PCIe link, a busy memory bus."""
    rows: Sequence[Mapping[str, Any]] = network.get("inside", ())
    if len(rows) < 3:
        return
    usual = statistics.median(map(gbit_s, rows))
    for row in rows:
        found = gbit_s(row)
        level = level_of(fails=found < SLOW_FAIL * usual, warns=found < SLOW_WARN * usual)
        fix = "have its links looked at (nvidia-smi nvlink -s, nvidia-smi topo -m), or keep the node out: launch.slurm.exclude"
        yield row["node"], graded("inside", level, f"{found:.1f} Gbit/s", f"{SLOW_WARN:.0%} of the median, {usual:.1f}", fix)


def check_cluster_file(network: Mapping[str, Any], request: CheckupRequest) -> NodeFindings:
    """Bandwidth between neighbours against cluster.network_gbit_s, which is the share of one rank in one direction."""
    edges: Sequence[Mapping[str, Any]] = network.get("between", ())
    stated = request.network_gbit_s
    if not edges or stated is None:
        return
    for node in network["nodes"]:
        found = max(gbit_s(edge) for edge in edges if node in edge["nodes"])
        level = WARN if found < SLOW_WARN * stated else OK
        expected = f"{SLOW_WARN:.0%} of cluster.network_gbit_s = {stated:g}"
        fix = "see that NCCL takes the fast network (NCCL_DEBUG=INFO, cluster.interface), or correct cluster.network_gbit_s"
        yield node, graded("network against the cluster file", level, f"{found:.1f} Gbit/s a rank", expected, fix)


def compare(
    nodes: Mapping[str, NodeFacts], network: Mapping[str, Any] | None, request: CheckupRequest
) -> dict[str, list[Finding]]:
    """The findings, by node, that need more than one node or the measured network."""
    found: dict[str, list[Finding]] = {node: [] for node in nodes}
    checks: list[NodeFindings] = [check_versions(nodes), check_memory_size(nodes)] if len(nodes) > 1 else []
    if network is not None:
        checks += [check_clocks(network), check_compute(network, request), check_neighbours(network)]
        checks += [check_inside(network), check_cluster_file(network, request)]
    for check in checks:
        for node, finding in check:
            if node in found:
                found[node].append(finding)
    return found
