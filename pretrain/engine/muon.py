"""Muon on canonical matrices: the same update under every layout, engine and ZeRO stage.

In: the slots of an engine and their reduced, clipped gradients. Out: main weights, updated in place. The momentum is elementwise,
so it is cut as the weights are. Newton-Schulz needs whole matrices: each has one owner among the ranks of its pipeline stage,
which gets the pieces, solves the matrix once and sends every holder its part (pretrain/engine/matrix_exchange.py).

    M <- momentum M + (1 - momentum) G;   N = momentum M + (1 - momentum) G with Nesterov's step, else M
    W <- (1 - lr decay) W - lr scale NewtonSchulz(N)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from configs.schema import Config
from parallel.muon import newton_schulz_flops, split_rows, updates_with_muon
from pretrain.engine import matrix_exchange as exchanges
from pretrain.engine.matrix_exchange import MatrixPiece, Wave
from pretrain.engine.newton_schulz import COEFFICIENTS, newton_schulz, update_scale
from pretrain.engine.slots import Slot
from pretrain.model.shards import Shard
from pretrain.model.tensor_slice import TensorSlice, split_range


class Muon:
    """The momentum of this rank's slots, and their update. Construction and `step` are collective over the stage.

    `slots`: those of an engine that Muon updates. `shards`: all shards of this rank's chunks, which have the same names on every
    rank of the stage. `group`: the ranks of the stage. `device`: where the exchange and Newton-Schulz run; with offload, the
    slots are elsewhere.
    """

    def __init__(
        self,
        config: Config,
        slots: Sequence[Slot],
        shards: Iterable[Shard],
        group: dist.ProcessGroup,
        device: torch.device,
        wave_elements: int = exchanges.WAVE_ELEMENTS,
    ) -> None:
        self.config, self.options, self.slots = config, config.optimizer.muon, list(slots)
        self.group, self.device = group, device
        self._momentum = {id(slot): torch.zeros_like(slot.main, dtype=torch.float32, requires_grad=False) for slot in slots}
        names = {shard.name: shard.global_shape for shard in shards}
        names = {name: shape for name, shape in sorted(names.items()) if updates_with_muon(name, shape, config.optimizer)}
        # Matrices in one order on all ranks of the stage: by name, and by expert inside a stack.
        first: dict[str, int] = {}
        self.matrices: list[tuple[str, tuple[int, int]]] = []
        for name, shape in names.items():
            first[name] = len(self.matrices)
            self.matrices += [(name, (shape[-2], shape[-1]))] * (shape[0] if len(shape) == 3 else 1)
        self.runs = {name: split_rows(name, shape[-2], config.model, self.options) for name, shape in names.items()}
        self.pieces: list[MatrixPiece] = []
        # For each piece: its slot, and where it begins in the slot.
        self.places: list[tuple[Slot, int]] = []
        for slot in self.slots:
            for position, slice_, start, stop in slot.shard.slice_ranges(slot.start, slot.stop):
                self.pieces.append(_matrix_piece(first[slot.shard.name], slice_, start, stop))
                self.places.append((slot, position - slot.start))
        sizes = [rows * columns for _, (rows, columns) in self.matrices]
        costs = [newton_schulz_flops(*shape, self.options.ns_steps) for _, shape in self.matrices]
        everywhere = exchanges.gather_pieces(self.pieces, group, device)
        self.waves = exchanges.plan_waves(everywhere, group.rank(), sizes, costs, wave_elements)

    def momentum_of(self, slot: Slot) -> torch.Tensor | None:
        """The momentum of a slot, with the shape of its main weights; None: the slot is not Muon's."""
        return self._momentum.get(id(slot))

    @torch.no_grad()
    def step(self, gradients: Mapping[int, torch.Tensor], learning_rate: float) -> None:
        """Update the main weights. `gradients`: clipped, by id of the slot."""
        rate = learning_rate * self.options.lr_ratio
        keep = 1 - rate * self.config.optimizer.weight_decay
        flat = {}
        for slot in self.slots:
            gradient, momentum = gradients[id(slot)].float().view(-1), self._momentum[id(slot)].view(-1)
            momentum.lerp_(gradient, 1 - self.options.momentum)
            flat[id(slot)] = gradient, momentum
        for wave in self.waves:
            for index, update in self._solve(wave, flat):
                slot, position = self.places[index]
                main = slot.main.detach().view(-1)[position : position + update.numel()]
                main.mul_(keep).add_(update.to(main.device), alpha=-rate)

    def _solve(self, wave: Wave, flat: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Iterable[tuple[int, torch.Tensor]]:
        """(index of a piece of this rank, its part of the scaled orthogonal update) for each piece of the wave."""

        def source(index: int) -> torch.Tensor:
            slot, position = self.places[index]
            gradient, momentum = (value[position : position + self.pieces[index].size] for value in flat[id(slot)])
            return gradient.lerp(momentum, self.options.momentum) if self.options.nesterov else momentum

        def sizes(pieces: Sequence[Sequence[MatrixPiece]]) -> list[list[int]]:
            return [[piece.size for piece in each] for each in pieces]

        send = [[source(index) for index in indices] for indices in wave.send]
        whole = {matrix: torch.zeros(self.matrices[matrix][1], device=self.device) for matrix in wave.owned}
        arrived = exchanges.exchange(send, sizes(wave.receive), self.group, self.device)
        for pieces, values in zip(wave.receive, arrived, strict=True):
            for piece, value in zip(pieces, values, strict=True):
                for view, part in _views(whole[piece.matrix], piece, value):
                    view.copy_(part)
        self._orthogonalise(whole)
        back = [[_cut(whole[piece.matrix], piece) for piece in pieces] for pieces in wave.send_back]
        mine = [[self.pieces[index] for index in indices] for indices in wave.receive_back]
        for indices, updates in zip(
            wave.receive_back, exchanges.exchange(back, sizes(mine), self.group, self.device), strict=True
        ):
            yield from zip(indices, updates, strict=True)

    def _orthogonalise(self, whole: dict[int, torch.Tensor]) -> None:
        """Replace each matrix of these canonical matrices with its scaled orthogonal factor."""
        options = self.options
        dtype = torch.bfloat16 if options.ns_dtype == "bf16" else torch.float32

        def solve(stack: torch.Tensor) -> torch.Tensor:
            factor = newton_schulz(stack, COEFFICIENTS[options.ns_coefficients], options.ns_steps, dtype)
            return factor * update_scale(stack.shape[-2], stack.shape[-1], options.scale)

        runs = [(matrix, run) for matrix in whole for run in self.runs[self.matrices[matrix][0]]]
        parts = [torch.cat([whole[matrix][start:stop] for start, stop in run]) for matrix, run in runs]
        for (matrix, run), solved in zip(runs, exchanges.solve_alike(parts, solve), strict=True):
            for (start, stop), rows in zip(run, solved.split([stop - start for start, stop in run]), strict=True):
                whole[matrix][start:stop] = rows


def make_muon(
    config: Config,
    slots: Sequence[Slot],
    shards: Sequence[Mapping[str, Shard]],
    groups: ProcessGroupCollection,
    device: torch.device,
) -> Muon | None:
    """Muon over those of an engine's slots that it updates; None: optimizer.kind is another. Collective over the stage.

    `shards`: of each chunk of this rank, by local name.
    """
    if config.optimizer.kind != "muon":
        return None
    chosen = [slot for slot in slots if updates_with_muon(slot.shard.name, slot.shard.global_shape, config.optimizer)]
    every = [shard for chunk in shards for shard in chunk.values()]
    return Muon(config, chosen, every, groups.tp_dp_cp, device)


def _matrix_piece(first: int, slice_: TensorSlice, start: int, stop: int) -> MatrixPiece:
    """A range of a canonical slice as a piece of a matrix. `first`: number of the tensor's first matrix."""
    if len(slice_.shape) == 2:
        return MatrixPiece(first, slice_, start, stop)
    assert slice_.shape[0] == 1, "each expert has slices of its own"
    return MatrixPiece(first + slice_.offset[0], TensorSlice(slice_.offset[1:], slice_.shape[1:]), start, stop)


def _views(matrix: torch.Tensor, piece: MatrixPiece, value: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """(rectangle of the matrix, the same elements of `value`): a flat range is a few rectangles."""
    everything = TensorSlice((0, 0), (matrix.shape[0], matrix.shape[1]))
    for position, part in split_range(piece.slice_, piece.start, piece.stop):
        first = position - piece.start
        yield matrix[part.slices_of(everything)], value[first : first + part.size].view(part.shape)


def _cut(matrix: torch.Tensor, piece: MatrixPiece) -> torch.Tensor:
    """The elements of a piece: [stop - start]."""
    value = torch.empty(piece.size, device=matrix.device)
    for view, part in _views(matrix, piece, value):
        part.copy_(view)
    return value


def hide_in_step(optimizer: torch.optim.Optimizer, is_hidden: Callable[[dict[str, Any], torch.Tensor], bool]) -> None:
    """Keep parameters out of an optimizer's own steps. `is_hidden` gets a group and a parameter.

    A parameter without gradient would not do: Transformer Engine's FusedAdam makes both moments, 8 bytes an element, of each
    parameter that it sees.
    """
    hidden: list[tuple[dict[str, Any], list[torch.Tensor]]] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            hidden.append((group, group["params"]))
            group["params"] = [parameter for parameter in group["params"] if not is_hidden(group, parameter)]

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        while hidden:
            group, parameters = hidden.pop()
            group["params"] = parameters

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
