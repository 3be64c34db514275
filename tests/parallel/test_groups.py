"""Process groups at scale, on a process group that moves nothing: 4,096 ranks as seen by some of them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.groups import make_groups
from parallel.layout import Layout

LAYOUT = Layout(tensor=4, sequence=True, pipeline=8, virtual_pipeline=2, context=2, expert=32, nodes=512, processes_per_node=8)


def groups_of(rank: int, sender: Connection) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=LAYOUT.world_size)
    groups = make_groups(LAYOUT, 1)
    names = ("tp", "cp", "dp", "pp", "ep", "expt_tp", "expt_dp", "tp_ep_pp", "dp_cp", "mp")
    sender.send({name: dist.get_process_group_ranks(getattr(groups, name)) for name in names})


@pytest.mark.parametrize("rank", [0, 1703, 4095])
def test_groups_of_4096_ranks_are_the_layouts(rank: int) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=groups_of, args=(rank, sender))
    process.start()
    assert receiver.poll(120), "no answer"
    found = receiver.recv()
    process.join()
    sizes = {name: len(ranks) for name, ranks in found.items()}
    assert sizes == {
        "tp": 4, "cp": 2, "dp": 64, "pp": 8, "ep": 32, "expt_tp": 1, "expt_dp": 16, "tp_ep_pp": 256, "dp_cp": 128, "mp": 32,
    }  # fmt: skip
    assert all(rank in ranks for ranks in found.values())
    assert found["tp"] == list(range(rank // 4 * 4, rank // 4 * 4 + 4)), "tensor ranks are neighbours"
