"""Layout to process groups: Megatron-Core creates them, the layout says which ranks belong together, both must agree.

Megatron-Core's own code reads some groups from its module `parallel_state`, so they live there; ours are passed by hand
as one `ProcessGroupCollection`.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel.layout import Layout
from parallel.random_streams import stream_seed

# collection field -> (grid of the layout, axes)
_AXES = {
    "tp": ("attention", "tp"),
    "cp": ("attention", "cp"),
    "dp": ("attention", "dp"),
    "pp": ("attention", "pp"),
    "dp_cp": ("attention", "dp-cp"),
    "mp": ("attention", "tp-pp"),
    "ep": ("expert", "ep"),
    "expt_tp": ("expert", "tp"),
    "expt_dp": ("expert", "dp"),
    "tp_ep_pp": ("expert", "tp-ep-pp"),
}


def make_groups(layout: Layout, seed: int) -> ProcessGroupCollection:
    """All process groups of this rank, and the random streams that differ by them.

    Collective over all ranks. Costs one group a line of the grid on every rank; NCCL connects them at their first use.
    """
    assert dist.get_world_size() == layout.world_size, "check_environment comes first"
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    _verify(groups, layout)
    place = groups.pp.rank(), groups.dp.rank(), groups.cp.rank()
    tensor_parallel.model_parallel_cuda_manual_seed(stream_seed(seed, *place))
    return groups


def _verify(groups: ProcessGroupCollection, layout: Layout) -> None:
    """Every group of this rank holds exactly the ranks that the layout gives it."""
    rank = dist.get_rank()
    for field, (grid, axes) in _AXES.items():
        got = dist.get_process_group_ranks(getattr(groups, field))
        lines = layout.groups(axes) if grid == "attention" else layout.expert_groups(axes)
        want = next(list(line) for line in lines if rank in line)
        assert sorted(got) == sorted(want), f"group {field} holds ranks {got}, the layout says {want}"


def current_degrees() -> dict[str, int]:
    """The degrees of the groups that this process is in, by the layout's names."""
    degrees: dict[str, Any] = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return degrees


def close_groups() -> None:
    """Forget the groups, so that a process can make others."""
    parallel_state.destroy_model_parallel()
