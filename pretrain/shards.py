"""Canonical names and slices: which part of which tensor of the whole model a local parameter is.

In: a chunk of the model and its groups. Out: a `Shard` a parameter or buffer. Names do not depend on layout, stage,
Transformer Engine, or grouped experts: layers carry their global number, experts are stacked on dim 0 of one tensor
([experts, rows, columns]), norms have their own names also where Transformer Engine fuses them into the next product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.boxes import Box

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
    boxes: tuple[Box, ...]
    data_rank: int
    num_data: int
    tensor_replica: int
    duplicate: bool

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, Box, int, int]]:
        """The flat range [start, stop) of the local tensor as (local position, box, start in box, stop in box)."""
        first = 0
        for box in self.boxes:
            low, high = max(start, first), min(stop, first + box.size)
            if low < high:
                yield low, box, low - first, high - first
            first += box.size


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
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def map_shards(chunk: GPTModel, groups: ProcessGroupCollection) -> dict[str, Shard]:
    """Local name -> Shard, in the order of the model."""
    config = chunk.config
    experts = config.num_moe_experts or 0
    first_expert = groups.ep.rank() * (experts // groups.ep.size())
    layers = {str(index): layer.layer_number - 1 for index, layer in enumerate(chunk.decoder.layers)}
    shards = {}
    for local_name, tensor in local_tensors(chunk):
        match = re.match(r"^decoder\.layers\.(\d+)\.", local_name)
        name, expert = canonical_name(local_name, layers[match[1]] if match else None, first_expert)
        gated = bool(config.gated_linear_unit) and "linear_fc1." in local_name
        shards[local_name] = _shard(name, tensor, expert, experts, gated, chunk, groups)
    return shards


def _shard(
    name: str,
    tensor: torch.Tensor,
    expert: int | None,
    num_experts: int,
    gated: bool,
    chunk: GPTModel,
    groups: ProcessGroupCollection,
) -> Shard:
    tensor_group = groups.tp if expert is None else groups.expt_tp
    data_group = groups.dp_cp if expert is None else groups.expt_dp
    split = bool(getattr(tensor, "tensor_model_parallel", False)) and tensor_group.size() > 1
    dim = getattr(tensor, "partition_dim", -1) if split else -1
    shape = list(tensor.shape)
    offset = [0] * len(shape)
    boxes = [(offset, shape)]
    if split:
        size, rank = tensor_group.size(), tensor_group.rank()
        # A gated first product holds [gate; up], each of them split over the ranks.
        parts = 2 if gated and dim == 0 else 1
        length = shape[dim] // parts
        boxes = []
        for part in range(parts):
            part_shape, part_offset = list(shape), list(offset)
            part_shape[dim] = length
            part_offset[dim] = part * length * size + rank * length
            boxes.append((part_offset, part_shape))
        shape[dim] *= size
    if expert is not None:
        shape = [num_experts, *shape]
        boxes = [([expert, *o], [1, *s]) for o, s in boxes]
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    return Shard(
        name=name,
        global_shape=tuple(shape),
        boxes=tuple(Box(tuple(o), tuple(s)) for o, s in boxes),
        data_rank=data_group.rank(),
        num_data=data_group.size(),
        tensor_replica=0 if split else tensor_group.rank(),
        duplicate=name.startswith("embedding.") and not chunk.pre_process,
    )
