"""The random state, with which dropout and jitter continue. A state belongs to a rank, so only the same layout can use it.

In: a checkpoint's reader. Out: generator states by name, and the same as slices of a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from parallel.groups import current_degrees
from pretrain.checkpoint.read import CheckpointReader
from pretrain.engine.base import StateSlice
from pretrain.model.tensor_slice import TensorSlice


def _tracker() -> Any:
    """The named random generators of Megatron-Core, which tensor and expert ranks use."""
    return get_cuda_rng_tracker()


def random_state() -> dict[str, torch.Tensor]:
    """Generator states of this rank by name, uint8."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in _tracker().get_states().items():
        states[f"tracker-{name}"] = state if isinstance(state, torch.Tensor) else state.get_state()
    return states


def random_state_slices(rank: int) -> list[StateSlice]:
    """The random state as slices of a checkpoint."""
    state_slices = []
    for name, state in random_state().items():
        slice_ = TensorSlice((0,), (state.numel(),))
        state_slices.append(StateSlice("rng", f"rank_{rank:05d}/{name}", slice_.shape, slice_, 0, slice_.size, state))
    return state_slices


def read_random_state(reader: CheckpointReader) -> dict[str, torch.Tensor] | None:
    """This rank's generator states. None: another layout wrote them, and the generators keep their fresh seeds.

    A layout with as many ranks can't use the states of another one either, because data ranks would then draw the numbers of
    tensor ranks. Raises DamagedFile.
    """
    written = reader.manifest
    if written.world_size != dist.get_world_size() or not reader.has("rng"):
        return None
    if any(written.layout.get(axis, degree) != degree for axis, degree in current_degrees().items()):
        return None
    state_slices = random_state_slices(dist.get_rank())
    reader.fill(state_slices)
    return {state_slice.name.split("/", 1)[1]: state_slice.data for state_slice in state_slices}


def set_random_state(states: dict[str, torch.Tensor] | None) -> None:
    """Set torch's and Megatron-Core's generators to states of this layout. None: leave them as they are."""
    if states is None:
        return
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    _tracker().set_states({name[len("tracker-") :]: state for name, state in states.items() if "tracker-" in name})
