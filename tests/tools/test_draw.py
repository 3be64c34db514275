"""`phalanx check --draw`: the pictures say what Megatron-Core does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core.pipeline_parallel import schedules

from parallel.layout import Layout
from tools import check
from tools.draw_grid import draw_grid
from tools.draw_pipeline import BACKWARD_SLOTS, COLUMNS, FORWARD_SLOTS, draw_pipeline, passes_of, start_slots

SHAPES = [(2, 1, 3), (4, 1, 8), (4, 1, 2), (8, 1, 20), (2, 2, 4), (4, 3, 8), (2, 4, 2), (3, 2, 9)]


@pytest.mark.parametrize(("stages", "chunks", "micro"), SHAPES)
def test_the_order_is_megatrons(stages: int, chunks: int, micro: int) -> None:
    for stage in range(stages):
        passes = passes_of(stage, stages, chunks, micro)
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        communicator: Any = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None)
        total, _, warm_up, _ = schedules.get_pp_rank_microbatches(micro, chunks, stages, p2p_communicator=communicator)
        assert len(passes) == 2 * total
        first_backward = next(number for number, one in enumerate(passes) if one.backward)
        # The steady phase begins with a forward pass, when there is one left.
        assert first_backward == min(warm_up + 1, total)
        table = schedules.get_schedule_table(micro, chunks, stages) if chunks > 1 else [(number, 0) for number in range(micro)]
        assert [(one.micro_batch, one.chunk) for one in passes if not one.backward] == table
        backward = [(one.micro_batch, one.chunk) for one in passes if one.backward]
        assert backward == [(number, chunks - 1 - chunk) for number, chunk in table]


@pytest.mark.parametrize(("stages", "chunks", "micro"), SHAPES)
def test_no_stage_does_two_things_at_once_and_the_bubble_is_the_formulas(stages: int, chunks: int, micro: int) -> None:
    starts = start_slots(stages, chunks, micro)
    taken: set[tuple[int, int]] = set()
    for (stage, one), start in starts.items():
        slots = {(stage, slot) for slot in range(start, start + (BACKWARD_SLOTS if one.backward else FORWARD_SLOTS))}
        assert not slots & taken
        taken |= slots
    length = max(slot for _, slot in taken) + 1
    if micro >= stages:
        assert length == (micro * chunks + stages - 1) * (FORWARD_SLOTS + BACKWARD_SLOTS)


def test_long_schedules_are_cut_to_a_line() -> None:
    lines = draw_pipeline(8, 2, 256)
    assert len(lines) == 9 and "of 256 micro-batches" in lines[0]
    assert max(map(len, lines[1:])) <= COLUMNS + 9
    assert draw_pipeline(1, 1, 8) == []


def test_the_grid_shows_who_shares_a_group() -> None:
    layout = Layout(tensor=2, pipeline=2, expert=2, nodes=2, processes_per_node=4)
    text = "\n".join(draw_grid(layout))
    assert "tensor         4 groups of 2 ranks, inside a node; the first: 0, 1" in text
    assert "pipeline       4 groups of 2 ranks, over 2 nodes; the first: 0, 4" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["tensor", "0", "0", "1", "1"] in rows and ["tensor", "2", "2", "3", "3"] in rows
    assert ["data", "0", "1", "0", "1"] in rows and ["expert", "0", "0", "1", "1"] in rows


def test_a_large_grid_is_drawn_in_part() -> None:
    lines = draw_grid(Layout(tensor=8, pipeline=16, expert=64, nodes=12_800, processes_per_node=8))
    assert lines[-1] == "… and 12,792 nodes more"
    assert np.max([len(line) for line in lines]) <= COLUMNS + 10


def test_the_command_draws(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["quickstart", "--no-data", "--draw"]) == 0
    out = capsys.readouterr().out
    assert "node 0" in out and "schedule 1F1B, 4 micro-batches" in out and "stage 1" in out
