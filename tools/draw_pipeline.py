"""The pipeline schedule as a picture: what each stage does when, 1F1B or interleaved.

In: stages, chunks a stage, micro-batches. Out: text. The orders are those of Megatron-Core's schedules (arXiv 2104.04473);
a backward pass takes as long as two forward passes, sending takes no time.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase

COLUMNS = 120
FORWARD_SLOTS, BACKWARD_SLOTS = 1, 2


@dataclass(frozen=True)
class ChunkPass:
    """One micro-batch through one chunk of a stage. All numbers from 0."""

    backward: bool
    chunk: int
    micro_batch: int


def passes_of(stage: int, stages: int, chunks: int, micro_batches: int) -> list[ChunkPass]:
    """What one stage runs, in order."""
    # With chunks, micro-batches go through each chunk in groups as large as there are stages.
    group = stages if chunks > 1 else 1
    table = [
        (chunk, micro)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro in range(first, min(first + group, micro_batches))
    ]
    warm_up = (stages - stage - 1) * (2 if chunks > 1 else 1) + (chunks - 1) * group
    warm_up = min(warm_up, len(table))
    forward = [ChunkPass(False, chunk, micro) for chunk, micro in table]
    backward = [ChunkPass(True, chunks - 1 - chunk, micro) for chunk, micro in table]
    steady = len(table) - warm_up
    pairs = [one for number in range(steady) for one in (forward[warm_up + number], backward[number])]
    return [*forward[:warm_up], *pairs, *backward[steady:]]


def start_slots(stages: int, chunks: int, micro_batches: int) -> dict[tuple[int, ChunkPass], int]:
    """(stage, pass) -> the slot in which it starts, each as early as its input and its stage allow."""
    waiting = [passes_of(stage, stages, chunks, micro_batches) for stage in range(stages)]
    starts: dict[tuple[int, ChunkPass], int] = {}
    position, free = [0] * stages, [0] * stages
    left = sum(map(len, waiting))
    while left:
        before = left
        for stage, passes in enumerate(waiting):
            while position[stage] < len(passes):
                one = passes[position[stage]]
                source = _source(stage, one, stages, chunks)
                if source is not None and source not in starts:
                    break
                ready = 0 if source is None else starts[source] + _slots(source[1])
                starts[stage, one] = max(free[stage], ready)
                free[stage] = starts[stage, one] + _slots(one)
                position[stage] += 1
                left -= 1
        assert left < before, "every order of passes lets some stage go on"
    return starts


def _slots(one: ChunkPass) -> int:
    return BACKWARD_SLOTS if one.backward else FORWARD_SLOTS


def _source(stage: int, one: ChunkPass, stages: int, chunks: int) -> tuple[int, ChunkPass] | None:
    """The pass whose output this one takes; None for the embedding's."""
    step, ends_at, next_stage = (1, stages - 1, 0) if one.backward else (-1, 0, stages - 1)
    if stage != ends_at:
        return stage + step, one
    chunk = one.chunk + step
    if 0 <= chunk < chunks:
        return next_stage, ChunkPass(one.backward, chunk, one.micro_batch)
    return (stage, ChunkPass(False, one.chunk, one.micro_batch)) if one.backward else None


def draw_pipeline(stages: int, chunks: int, micro_batches: int) -> list[str]:
    """Lines; empty for a single stage. Fewer micro-batches are drawn where the line would be too long."""
    if stages == 1:
        return []
    group = stages if chunks > 1 else 1
    shown = micro_batches
    while shown > group and _length(stages, chunks, shown) > COLUMNS:
        shown -= group
    cell = _cell_width(chunks, shown)
    name = f"interleaved 1F1B, {chunks} chunks a stage" if chunks > 1 else "1F1B"
    part = f"{shown} of {micro_batches}" if shown < micro_batches else str(micro_batches)
    legend = "3 forward, 3' backward, . idle" + ("; a, b: the chunk" if chunks > 1 else "")
    lines = [f"schedule {name}, {part} micro-batches ({legend})"]
    starts = start_slots(stages, chunks, shown)
    last = max(start + _slots(one) for (_, one), start in starts.items())
    for stage in range(stages):
        cells = [".".rjust(cell)] * last
        for (owner, one), start in starts.items():
            if owner == stage:
                text = f"{one.micro_batch}{ascii_lowercase[one.chunk % 26] if chunks > 1 else ''}"
                cells[start] = (text + "'" if one.backward else text).rjust(cell)
                for slot in range(start + 1, start + _slots(one)):
                    cells[slot] = "-" * cell
        line = "".join(cells)
        lines.append(f"stage {stage:<3}" + (line if len(line) <= COLUMNS else line[: COLUMNS - 2] + " …"))
    return lines


def _cell_width(chunks: int, micro_batches: int) -> int:
    return len(str(micro_batches - 1)) + (chunks > 1) + 2


def _length(stages: int, chunks: int, micro_batches: int) -> int:
    """Characters of a line: all slots of a stage's work and of the time it waits for the others' first and last."""
    slots = (micro_batches * chunks + stages - 1) * (FORWARD_SLOTS + BACKWARD_SLOTS)
    return slots * _cell_width(chunks, micro_batches)
