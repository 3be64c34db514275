"""The layout's groups are megatron-core's, for the attention and the expert grid, over every small combination."""

from __future__ import annotations

from itertools import product

import pytest
from megatron.core.parallel_state import RankGenerator

from configs.load import load_config
from parallel.layout import Layout, make_layout

ORDER = "tp-cp-ep-dp-pp"  # the default of initialize_model_parallel


def layouts() -> list[Layout]:
    """Every legal layout of up to 24 ranks with degrees of 1, 2, 3 and 4."""
    found = []
    for world in (1, 2, 3, 4, 6, 8, 12, 16, 24):
        for tp, cp, pp, ep, etp in product((1, 2, 3, 4), repeat=5):
            if world % (tp * cp * pp) == 0 and world % (etp * ep * pp) == 0:
                layout = Layout(
                    tensor=tp, context=cp, pipeline=pp, expert=ep, expert_tensor=etp, nodes=1, processes_per_node=world
                )  # fmt: skip
                found.append(layout)
    return found


def test_groups_equal_megatrons() -> None:
    tried = layouts()
    assert len(tried) > 300
    for layout in tried:
        # As initialize_model_parallel builds its two generators.
        dense = RankGenerator(tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=layout.context, order=ORDER)
        expert = RankGenerator(
            tp=layout.expert_tensor, ep=layout.expert, dp=layout.expert_data, pp=layout.pipeline, cp=1, order=ORDER
        )  # fmt: skip
        for axes in ("tp", "cp", "dp", "pp", "dp-cp", "tp-pp", "tp-cp", "tp-dp-cp", "tp-dp", "cp-pp"):
            assert layout.groups(axes) == dense.get_ranks(axes), (layout, axes)
        for axes in ("tp", "ep", "dp", "pp", "tp-ep", "tp-ep-pp", "ep-dp", "tp-ep-dp"):
            assert layout.expert_groups(axes) == expert.get_ranks(axes), (layout, axes)


@pytest.mark.parametrize("layout", layouts()[::7])
def test_groups_partition_the_world(layout: Layout) -> None:
    for axes in ("tp", "cp", "dp", "pp", "dp-cp", "tp-pp"):
        assert sorted(rank for group in layout.groups(axes) for rank in group) == list(range(layout.world_size))
    for axes in ("tp", "ep", "dp", "tp-ep-pp"):
        assert sorted(rank for group in layout.expert_groups(axes) for rank in group) == list(range(layout.world_size))


@pytest.mark.parametrize("layout", layouts()[::11])
def test_coordinates_agree_with_groups(layout: Layout) -> None:
    for axis, where in (("tp", "tp"), ("cp", "cp"), ("dp", "dp"), ("pp", "pp")):
        for group in layout.groups(axis):
            assert [layout.coordinates(rank)[where] for rank in group] == list(range(len(group)))
    for axis, where in (("tp", "etp"), ("ep", "ep"), ("dp", "edp")):
        for group in layout.expert_groups(axis):
            assert [layout.coordinates(rank)[where] for rank in group] == list(range(len(group)))


def test_both_grids_have_the_same_stages() -> None:
    layout = Layout(tensor=2, pipeline=3, context=2, expert=4, nodes=3, processes_per_node=16)
    assert layout.groups("tp-cp-dp") == layout.expert_groups("tp-ep-dp")


def test_a_large_world_is_cheap_to_lay_out() -> None:
    layout = Layout(tensor=8, pipeline=16, context=2, expert=64, expert_tensor=1, nodes=12800, processes_per_node=8)
    assert layout.group_array("tp").shape == (12800, 8)
    assert layout.expert_group_array("ep").shape == (layout.world_size // 64, 64)
    assert layout.expert_data == 100 and layout.data == 400


def test_degrees_of_the_quickstart() -> None:
    layout = make_layout(load_config("quickstart").config)
    assert layout.degrees() == {
        "tensor": 1, "sequence": False, "pipeline": 2, "virtual_pipeline": 1, "context": 1, "expert": 2, "expert_tensor": 1,
        "nodes": 1, "processes_per_node": 4, "world_size": 4, "data": 2, "expert_data": 1,
    }  # fmt: skip
    assert layout.describe() == "pp2·ep2·dp2" and Layout().describe() == "one rank"


def test_sequence_follows_tensor_unless_stated() -> None:
    words = ["parallel.tensor=2", "launch.processes_per_node=4"]
    assert make_layout(load_config("quickstart", words).config).sequence
    assert not make_layout(load_config("quickstart", [*words, "parallel.sequence=false"]).config).sequence


def test_unknown_axes_and_ranks_raise_value_error() -> None:
    with pytest.raises(ValueError, match="no axis ep in this grid; its axes are tp, cp, dp, pp"):
        Layout().groups("ep")
    with pytest.raises(ValueError, match="rank 1 is outside the world of 1 ranks"):
        Layout().coordinates(1)
