"""The grid of ranks as a picture, node by node: which ranks share which group. In: a layout. Out: text.

Torch-free.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from parallel.layout import Layout

COLUMNS = 120
NODES_SHOWN = 8

# Axis -> (is it of the expert grid, its name there)
_AXES = {
    "tensor": (False, "tp"),
    "context": (False, "cp"),
    "data": (False, "dp"),
    "pipeline": (False, "pp"),
    "expert tensor": (True, "tp"),
    "expert": (True, "ep"),
    "expert data": (True, "dp"),
}


def groups_of(layout: Layout, axis: str) -> NDArray[np.int64]:
    """Ranks of every group along an axis, [groups, ranks of a group]."""
    of_experts, name = _AXES[axis]
    return layout.expert_group_array(name) if of_experts else layout.group_array(name)


def draw_grid(layout: Layout) -> list[str]:
    """Lines: every axis larger than 1 with its groups, then node by node the group of each rank."""
    groups = {axis: groups_of(layout, axis) for axis in _AXES}
    groups = {axis: found for axis, found in groups.items() if found.shape[1] > 1}
    lines = [f"grid     {layout.world_size:,} ranks on {layout.nodes:,} nodes"]
    lines += [f"{axis:<14} {_describe(found, layout)}" for axis, found in groups.items()]
    if not groups:
        return lines
    numbers = {axis: _group_numbers(found) for axis, found in groups.items()}
    lines.append("ranks with the same number in a row share a group")
    shown = min(layout.nodes, NODES_SHOWN)
    width = max(len(str(number)) for number in (layout.world_size - 1, *(len(found) - 1 for found in groups.values()))) + 1
    for node in range(shown):
        lines += _draw_node(layout, node, numbers, width)
    if shown < layout.nodes:
        lines.append(f"… and {layout.nodes - shown:,} nodes more")
    return lines


def _describe(found: NDArray[np.int64], layout: Layout) -> str:
    """The groups of one axis in a line."""
    first = found[0]
    ranks = ", ".join(str(rank) for rank in first[:4]) + (", …" if len(first) > 4 else "")
    nodes = found // layout.processes_per_node
    spans = int((np.diff(np.sort(nodes, axis=1), axis=1) > 0).sum(axis=1).max()) + 1
    place = "inside a node" if spans == 1 else f"over {spans:,} nodes"
    return f"{len(found):,} groups of {len(first):,} ranks, {place}; the first: {ranks}"


def _group_numbers(found: NDArray[np.int64]) -> NDArray[np.int64]:
    """The group of each rank, [ranks]."""
    numbers = np.empty(found.size, dtype=np.int64)
    numbers[found] = np.arange(len(found))[:, None]
    return numbers


def _draw_node(layout: Layout, node: int, numbers: dict[str, NDArray[np.int64]], width: int) -> list[str]:
    lines = []
    first, end = node * layout.processes_per_node, (node + 1) * layout.processes_per_node
    step = (COLUMNS - 24) // width
    for start in range(first, end, step):
        ranks = range(start, min(start + step, end))
        lines.append(f"{f'node {node}' if start == first else '':<9}{'rank':<14}" + "".join(f"{r:>{width}}" for r in ranks))
        for axis, group in numbers.items():
            lines.append(f"{'':<9}{axis:<14}" + "".join(f"{group[r]:>{width}}" for r in ranks))
    return lines
