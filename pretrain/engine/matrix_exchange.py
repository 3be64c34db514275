"""The plan that brings each matrix whole to one rank of its pipeline stage, and its parts back to every rank that holds some.

In: each rank's pieces of matrices, as integers. Out: waves of all-to-all exchanges, the same on all ranks. The owner of a matrix
is the rank with the least work among those that hold a piece of it. Where several ranks hold the same piece, one of them sends it
and all of them get the result. A wave is bounded, so that the buffers of a large model stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist

from pretrain.model.tensor_slice import TensorSlice

# Elements that a rank may hold in the buffers of one wave: 256 MiB of fp32. A matrix that is larger has a wave of its own.
WAVE_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class MatrixPiece:
    """The flat range [start, stop) of `slice_`, a slice of matrix number `matrix`."""

    matrix: int
    slice_: TensorSlice
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def as_row(self) -> list[int]:
        return [self.matrix, *self.slice_.offset, *self.slice_.shape, self.start, self.stop]


def piece_of(row: Sequence[int]) -> MatrixPiece:
    """The inverse of `as_row`."""
    matrix, top, left, rows, columns, start, stop = row
    return MatrixPiece(matrix, TensorSlice((top, left), (rows, columns)), start, stop)


@dataclass
class Wave:
    """One exchange of this rank. The lists have one entry for each rank of the stage.

    `owned`: numbers of the matrices that this rank solves. `send`: this rank's pieces, by index, that the owner gets. `receive`:
    pieces of the owned matrices. `send_back` and `receive_back`: the same pieces after the solution, to every holder.
    """

    owned: list[int]
    send: list[list[int]]
    receive: list[list[MatrixPiece]]
    send_back: list[list[MatrixPiece]]
    receive_back: list[list[int]]


def empty_wave(size: int) -> Wave:
    """A wave without matrices, for `size` ranks."""
    return Wave([], *([[] for _ in range(size)] for _ in range(4)))  # type: ignore[arg-type]


@dataclass
class _Holders:
    """Who holds a piece of one matrix: (rank, index of the piece on that rank, piece)."""

    found: list[tuple[int, int, MatrixPiece]] = field(default_factory=list)

    def senders(self, owner: int) -> list[tuple[int, int, MatrixPiece]]:
        """Each different piece once: the owner's own copy, else that of the lowest rank."""
        chosen: dict[MatrixPiece, tuple[int, int, MatrixPiece]] = {}
        for held in sorted(self.found, key=lambda held: (held[0] != owner, held[0], held[1])):
            chosen.setdefault(held[2], held)
        return sorted(chosen.values(), key=lambda held: held[:2])


def gather_pieces(mine: Sequence[MatrixPiece], group: dist.ProcessGroup, device: torch.device) -> list[list[MatrixPiece]]:
    """The pieces of every rank of the group. Collective."""
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(mine)], device=device), group=group)
    longest = max(int(count) for count in counts)
    table = torch.zeros((longest, 7), dtype=torch.int64, device=device)
    if mine:
        table[: len(mine)] = torch.tensor([piece.as_row() for piece in mine], device=device)
    tables = [torch.empty_like(table) for _ in counts]
    dist.all_gather(tables, table, group=group)
    return [[piece_of(row) for row in rows[: int(count)].tolist()] for rows, count in zip(tables, counts, strict=True)]


def plan_waves(
    ranks: Sequence[Sequence[MatrixPiece]], me: int, sizes: Sequence[int], costs: Sequence[float], limit: int = WAVE_ELEMENTS
) -> list[Wave]:
    """The waves of rank `me`. `ranks`: the pieces of every rank. `sizes`, `costs`: elements and work of every matrix."""
    holders = [_Holders() for _ in sizes]
    for rank, pieces in enumerate(ranks):
        for index, piece in enumerate(pieces):
            holders[piece.matrix].found.append((rank, index, piece))
    work, buffers = [0.0] * len(ranks), [0] * len(ranks)
    waves = [empty_wave(len(ranks))]
    for matrix in sorted(range(len(sizes)), key=lambda matrix: (-costs[matrix], matrix)):
        held = holders[matrix]
        owner = min({rank for rank, _, _ in held.found}, key=lambda rank: (work[rank], rank))
        senders = held.senders(owner)
        assert sum(piece.size for _, _, piece in senders) == sizes[matrix], f"matrix {matrix} is not whole on its stage"
        work[owner] += costs[matrix]
        needs = _buffer_elements(held, owner, sizes[matrix])
        if any(buffers[rank] and buffers[rank] + need > limit for rank, need in needs.items()):
            waves.append(empty_wave(len(ranks)))
            buffers = [0] * len(ranks)
        for rank, need in needs.items():
            buffers[rank] += need
        _add(waves[-1], matrix, held, senders, owner, me)
    return waves


def _buffer_elements(held: _Holders, owner: int, size: int) -> dict[int, int]:
    """Rank -> elements that this matrix takes in its buffers: what it sends or gets back, and the owner's whole matrix."""
    needs = {owner: size}
    for rank, _, piece in held.found:
        needs[rank] = needs.get(rank, 0) + piece.size
        needs[owner] += piece.size
    return needs


def _add(wave: Wave, matrix: int, held: _Holders, senders: list[tuple[int, int, MatrixPiece]], owner: int, me: int) -> None:
    if owner == me:
        wave.owned.append(matrix)
    for rank, index, piece in senders:
        if rank == me:
            wave.send[owner].append(index)
        if owner == me:
            wave.receive[rank].append(piece)
    for rank, index, piece in sorted(held.found, key=lambda held: held[:2]):
        if rank == me:
            wave.receive_back[owner].append(index)
        if owner == me:
            wave.send_back[rank].append(piece)


def exchange(
    values: Sequence[Sequence[torch.Tensor]], sizes: Sequence[Sequence[int]], group: dist.ProcessGroup, device: torch.device
) -> list[tuple[torch.Tensor, ...]]:
    """One all-to-all of fp32 pieces. `values`: 1-D tensors for each rank. `sizes`: those that come from each rank.

    Returns what each rank sent, piece by piece. Collective.
    """
    outgoing = [value.to(device) for pieces in values for value in pieces]
    flat = torch.cat(outgoing) if outgoing else torch.empty(0, device=device)
    incoming = [sum(pieces) for pieces in sizes]
    arrived = flat
    if group.size() > 1:
        arrived = torch.empty(sum(incoming), device=device)
        leaving = [sum(value.numel() for value in pieces) for pieces in values]
        dist.all_to_all_single(arrived, flat, incoming, leaving, group=group)
    return [part.split(list(pieces)) for part, pieces in zip(arrived.split(incoming), sizes, strict=True)]


def solve_alike(parts: Sequence[torch.Tensor], solve: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """`solve` over stacks [n, rows, columns] of the parts with equal shapes. Returns one result for each part."""
    order = sorted(range(len(parts)), key=lambda index: tuple(parts[index].shape))
    results: list[torch.Tensor] = [torch.empty(0)] * len(parts)
    for _, alike in groupby(order, key=lambda index: tuple(parts[index].shape)):
        indices = list(alike)
        for index, result in zip(indices, solve(torch.stack([parts[index] for index in indices])), strict=True):
            results[index] = result
    return results
