"""Canonical names and slices: which part of which tensor of the whole model a local parameter is.

In: a chunk of the model and its groups. Out: a `Shard` for each parameter and buffer. Canonical names don't depend on layout,
stage, Transformer Engine or grouped experts. Layers have their global number. Experts are stacked on dim 0 of one tensor
[experts, rows, columns]. Norms have names of their own, also where Transformer Engine fuses them into the next projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel.compat.torch_private import saved_buffers
from pretrain.model.tensor_slice import TensorSlice

# Transformer Engine's fused norms -> the names of the separate ones.
_FUSED_NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
_EXPERT = (
    re.compile(r"^(?P<head>.*mlp\.experts)\.local_experts\.(?P<expert>\d+)\.(?P<tail>.+)$"),
    re.compile(r"^(?P<head>.*mlp\.experts)\.(?P<tail>linear_fc[12]\.(?:weight|bias))(?P<expert>\d+)$"),
)


@dataclass(frozen=True)
class Shard:
    """A local tensor as slices of a canonical tensor. The flat local tensor is the concatenation of its flat slices.

    `global_shape`: the shape of the canonical tensor. `num_data` data-parallel ranks have the same slices; this rank is
    `data_rank` of them. `tensor_replica`: this rank's number among tensor ranks with the same slices, 0 where the tensor is
    split. `duplicate`: this is the copy of the embedding on the last stage.
    """

    name: str
    global_shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]
    data_rank: int
    num_data: int
    tensor_replica: int
    duplicate: bool

    def slice_ranges(self, start: int, stop: int) -> Iterator[tuple[int, TensorSlice, int, int]]:
        """Split the flat range [start, stop) of the local tensor at the borders of its slices.

        Yields (flat position in the local tensor, slice, start in the slice, stop in the slice).
        """
        first = 0
        for slice_ in self.slices:
            low, high = max(start, first), min(stop, first + slice_.size)
            if low < high:
                yield low, slice_, low - first, high - first
            first += slice_.size


@dataclass(frozen=True)
class Experts:
    """`total`: the model's number of routed experts. `first`: the number of this rank's first expert, from 0."""

    total: int
    first: int


def canonical_name(name: str, layer_number: int | None, first_expert: int) -> tuple[str, int | None]:
    """(canonical name, number of the expert or None) of a local parameter. Layers and experts count from 0."""
    if layer_number is not None:
        name = re.sub(r"^decoder\.layers\.\d+\.", f"decoder.layers.{layer_number}.", name)
    name = name.replace(".mtp_model_layer.", ".transformer_layer.")
    for fused, separate in _FUSED_NORMS:
        name = name.replace(fused, separate)
    for pattern in _EXPERT:
        if match := pattern.match(name):
            return f"{match['head']}.{match['tail']}", first_expert + int(match["expert"])
    return name, None


def local_tensors(chunk: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(local name, tensor) of every parameter and every saved buffer of a chunk."""
    yield from chunk.named_parameters()
    for prefix, module in chunk.named_modules():
        for name, buffer in saved_buffers(module):
            yield (f"{prefix}.{name}" if prefix else name), buffer


def layer_of(layer: Any) -> int:
    """The number of a decoder layer in the whole model, counted from 0."""
    return layer.layer_number - 1


def map_shards(chunk: GPTModel, groups: ProcessGroupCollection) -> dict[str, Shard]:
    """The `Shard` of every local tensor by local name, in the order of the model."""
    config = chunk.config
    total = config.num_moe_experts or 0
    experts = Experts(total, groups.ep.rank() * (total // groups.ep.size()))
    layers = {str(index): layer_of(layer) for index, layer in enumerate(chunk.decoder.layers)}
    shards = {}
    for local_name, tensor in local_tensors(chunk):
        match = re.match(r"^decoder\.layers\.(\d+)\.", local_name)
        name, expert = canonical_name(local_name, layers[match[1]] if match else None, experts.first)
        gated = bool(config.gated_linear_unit) and "linear_fc1." in local_name
        shards[local_name] = _shard(name, tensor, expert, experts, gated, chunk, groups)
    return shards


def _shard(
    name: str,
    tensor: torch.Tensor,
    expert: int | None,
    experts: Experts,
    gated: bool,
    chunk: GPTModel,
    groups: ProcessGroupCollection,
) -> Shard:
    routed = ".mlp.experts." in name
    tensor_group = groups.expt_tp if routed else groups.tp
    data_group = groups.expt_dp if routed else groups.dp_cp
    split = bool(getattr(tensor, "tensor_model_parallel", False)) and tensor_group.size() > 1
    # Grouped experts hold the matrices of all local experts in one tensor.
    stacked = routed and expert is None
    matrix = tensor.shape[1:] if stacked else tensor.shape
    dim = getattr(tensor, "partition_dim", -1) if split else -1
    # A gated first product holds [gate; up], each of them split over the ranks.
    shape, slices = _slices(tuple(matrix), dim, 2 if gated and dim == 0 else 1, tensor_group.rank(), tensor_group.size())
    if routed:
        numbers = range(experts.first, experts.first + tensor.shape[0]) if stacked else (expert,)
        shape = (experts.total, *shape)
        slices = [TensorSlice((number or 0, *slice_.offset), (1, *slice_.shape)) for number in numbers for slice_ in slices]
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    return Shard(
        name=name,
        global_shape=shape,
        slices=tuple(slices),
        data_rank=data_group.rank(),
        num_data=data_group.size(),
        tensor_replica=0 if split else tensor_group.rank(),
        duplicate=name.startswith("embedding.") and not chunk.pre_process,
    )


def _slices(shape: tuple[int, ...], dim: int, parts: int, rank: int, size: int) -> tuple[tuple[int, ...], list[TensorSlice]]:
    """(shape of the whole tensor, this rank's slices) of a local tensor of shape `shape`.

    `dim` is split over `size` ranks; -1: no dim is. The dim consists of `parts` equal parts, and each is split on its own.
    """
    offset = (0,) * len(shape)
    if dim < 0:
        return shape, [TensorSlice(offset, shape)]
    length = shape[dim] // parts
    slices = []
    for part in range(parts):
        start = part * length * size + rank * length
        slices.append(TensorSlice((*offset[:dim], start, *offset[dim + 1 :]), (*shape[:dim], length, *shape[dim + 1 :])))
    return (*shape[:dim], shape[dim] * size, *shape[dim + 1 :]), slices
