"""Canonical names and slices: which part of which tensor of the whole model a local parameter is.

In: a chunk of the model and its groups. Out: a `Shard` a parameter or buffer. Names do not depend on layout, stage,
Transformer Engine, or grouped experts: layers carry their global number, experts are stacked on dim 0 of one tensor
([experts, rows, columns]), norms have their own names also where Transformer Engine fuses them into the next product.
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
    """A local tensor as slices of a canonical one: flattened, it is the concatenation of its boxes, each flattened.

    The same slices are on `num_data` data-parallel ranks (this one is `data_rank`), and, when nothing is split over the
    tensor ranks, on each of those (`tensor_replica` counts them). `duplicate` marks the embedding's copy on the last stage.
    """

    name: str
    global_shape: tuple[int, ...]
    boxes: tuple[TensorSlice, ...]
    data_rank: int
    num_data: int
    tensor_replica: int
    duplicate: bool

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, TensorSlice, int, int]]:
        """The flat range [start, stop) of the local tensor as (local position, box, start in box, stop in box)."""
        first = 0
        for box in self.boxes:
            low, high = max(start, first), min(stop, first + box.size)
            if low < high:
                yield low, box, low - first, high - first
            first += box.size


@dataclass(frozen=True)
class Experts:
    """Routed experts of the model, and the number of the first on this rank."""

    total: int
    first: int


def canonical_name(name: str, layer_number: int | None, first_expert: int) -> tuple[str, int | None]:
    """(canonical name, global expert or None) of a local parameter; layer and expert numbers count from 0."""
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
    """Every parameter and every saved buffer of a chunk by local name."""
    yield from chunk.named_parameters()
    for prefix, module in chunk.named_modules():
        for name, buffer in saved_buffers(module):
            yield (f"{prefix}.{name}" if prefix else name), buffer


def layer_of(layer: Any) -> int:
    """The number of a decoder layer in the whole model, from 0."""
    return layer.layer_number - 1


def map_shards(chunk: GPTModel, groups: ProcessGroupCollection) -> dict[str, Shard]:
    """Local name -> Shard, in the order of the model."""
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
    shape, boxes = _slices(tuple(matrix), dim, 2 if gated and dim == 0 else 1, tensor_group.rank(), tensor_group.size())
    if routed:
        numbers = range(experts.first, experts.first + tensor.shape[0]) if stacked else (expert,)
        shape = (experts.total, *shape)
        boxes = [TensorSlice((number or 0, *box.offset), (1, *box.shape)) for number in numbers for box in boxes]
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    return Shard(
        name=name,
        global_shape=shape,
        boxes=tuple(boxes),
        data_rank=data_group.rank(),
        num_data=data_group.size(),
        tensor_replica=0 if split else tensor_group.rank(),
        duplicate=name.startswith("embedding.") and not chunk.pre_process,
    )


def _slices(shape: tuple[int, ...], dim: int, parts: int, rank: int, size: int) -> tuple[tuple[int, ...], list[TensorSlice]]:
    """(whole shape, boxes) of a local tensor; `dim` is split over `size` ranks (-1: not), each of its parts apart."""
    offset = (0,) * len(shape)
    if dim < 0:
        return shape, [TensorSlice(offset, shape)]
    length = shape[dim] // parts
    boxes = []
    for part in range(parts):
        start = part * length * size + rank * length
        boxes.append(TensorSlice((*offset[:dim], start, *offset[dim + 1 :]), (*shape[:dim], length, *shape[dim + 1 :])))
    return (*shape[:dim], shape[dim] * size, *shape[dim + 1 :]), boxes
