"""Degrees and the world they make, as one frozen value with two grids over the same ranks.

In: the `parallel` and `launch` sections. Out: `Layout`: sizes, groups of ranks along any axes, a rank's coordinates.
Attention grid tp·cp·dp·pp, expert grid etp·ep·edp·pp; the first axis changes fastest (Megatron-Core's "tp-cp-ep-dp-pp").

Torch-free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import Config


@dataclass(frozen=True)
class Layout:
    """The degrees of a run. Legal by construction only through `make_layout` after the checks have passed."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    nodes: int = 1
    processes_per_node: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.processes_per_node

    @property
    def data(self) -> int:
        """Data parallel degree of attention, dense layers and embeddings."""
        return self.world_size // (self.tensor * self.context * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Data parallel degree of the routed experts."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def attention_axes(self) -> dict[str, int]:
        """Axes and sizes of the attention grid, fastest first."""
        return {"tp": self.tensor, "cp": self.context, "dp": self.data, "pp": self.pipeline}

    @property
    def expert_axes(self) -> dict[str, int]:
        """Axes and sizes of the expert grid, fastest first; "tp" is the expert tensor axis, "dp" the experts' data axis."""
        return {"tp": self.expert_tensor, "ep": self.expert, "dp": self.expert_data, "pp": self.pipeline}

    def group_array(self, axes: str) -> NDArray[np.int64]:
        """Ranks of every attention group along `axes` ("dp-cp"), [groups, ranks of a group]."""
        return _groups(self.attention_axes, axes)

    def expert_group_array(self, axes: str) -> NDArray[np.int64]:
        """Ranks of every expert group along `axes` ("tp-ep"), [groups, ranks of a group]."""
        return _groups(self.expert_axes, axes)

    def groups(self, axes: str) -> list[list[int]]:
        """`group_array` as lists. A group is ordered by the grid, whatever order `axes` has."""
        return self.group_array(axes).tolist()

    def expert_groups(self, axes: str) -> list[list[int]]:
        """`expert_group_array` as lists."""
        return self.expert_group_array(axes).tolist()

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands: tp, cp, dp, pp of the attention grid and etp, ep, edp of the expert grid."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the world of {self.world_size} ranks")
        attention = _coordinates(self.attention_axes, rank)
        expert = _coordinates(self.expert_axes, rank)
        return attention | {"etp": expert["tp"], "ep": expert["ep"], "edp": expert["dp"]}

    def degrees(self) -> dict[str, int | bool]:
        """Every degree and what follows from them, for JSON."""
        derived = {"world_size": self.world_size, "data": self.data, "expert_data": self.expert_data}
        return asdict(self) | derived

    def describe(self) -> str:
        """One line for people: the axes larger than 1, as in `tp2·pp2·ep2·dp2`."""
        sizes = {
            "tp": self.tensor,
            "cp": self.context,
            "pp": self.pipeline,
            "vpp": self.virtual_pipeline,
            "ep": self.expert,
            "etp": self.expert_tensor,
            "dp": self.data,
        }
        text = "·".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
        return text or "one rank"


def _groups(axes: dict[str, int], wanted: str) -> NDArray[np.int64]:
    names = list(axes)
    chosen = wanted.split("-")
    unknown = [axis for axis in chosen if axis not in axes]
    if unknown:
        raise ValueError(f"no axis {', '.join(unknown)} in this grid; its axes are {', '.join(axes)}")
    # numpy's last axis changes fastest, so the grid is laid out reversed.
    grid = np.arange(int(np.prod(list(axes.values())))).reshape([axes[name] for name in reversed(names)])
    position = {name: len(names) - 1 - i for i, name in enumerate(names)}
    outside = [position[name] for name in reversed(names) if name not in chosen]
    inside = [position[name] for name in reversed(names) if name in chosen]
    size = int(np.prod([axes[name] for name in names if name in chosen]))
    return grid.transpose(outside + inside).reshape(-1, size)


def _coordinates(axes: dict[str, int], rank: int) -> dict[str, int]:
    found = {}
    for axis, size in axes.items():
        rank, found[axis] = divmod(rank, size)
    return found


def world_size(config: Config) -> int:
    """Ranks of the run."""
    return config.launch.nodes * config.launch.processes_per_node


def sequence_parallel(config: Config) -> bool:
    """parallel.sequence; unset, it is on wherever there is tensor parallelism."""
    parallel = config.parallel
    return parallel.tensor > 1 if parallel.sequence is None else parallel.sequence


def make_layout(config: Config) -> Layout:
    """The layout of a config whose checks passed. The degrees must divide the world."""
    parallel, launch = config.parallel, config.launch
    layout = Layout(
        tensor=parallel.tensor,
        sequence=sequence_parallel(config),
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline or 1,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        nodes=launch.nodes,
        processes_per_node=launch.processes_per_node,
    )
    for axes in (layout.attention_axes, layout.expert_axes):
        size = int(np.prod(list(axes.values())))
        assert size == layout.world_size, f"grid {axes} does not fill {layout.world_size} ranks: check_config comes first"
    return layout
