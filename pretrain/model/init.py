"""Initial weights by canonical name and position, so that every layout starts from the same model.

Each canonical tensor has a counter-based random stream of its own: Philox, keyed by seed and name. Element i of the flattened
tensor depends on seed, name and i alone. A rank draws only the rows that it holds, some 80 million elements a second on a core.
"""

from __future__ import annotations

import hashlib
import math
import re
from math import prod

import numpy as np
import torch

from configs.model_schema import Model
from parallel.mup import init_factor
from pretrain.model.shards import Shard
from pretrain.model.tensor_slice import TensorSlice

_DEPTH_SCALED = re.compile(r"(self_attention\.linear_proj|linear_fc2)\.weight$")
_ONES = re.compile(r"(layernorm|norm)\.weight$|\.dt_bias$")
_PLAIN_NORM = re.compile(r"\.out_norm\.weight$")
_ZEROS = re.compile(r"(\.bias|softmax_offset|expert_bias)$")


def initial_std(name: str, num_dims: int, model: Model) -> float:
    """Standard deviation of a weight: init_std, or init_std / sqrt(2 L) for projections that write to the residual stream.

    L is the number of layers. Source: GPT-2 and Megatron-LM (arXiv 1909.08053), scaled_init_method_normal. With model.mup, the
    width scales it too (parallel/mup.py). `num_dims`: of the whole tensor.
    A convolution over K tokens has 1 / sqrt(3 K), the deviation of torch.nn.Conv1d's uniform values.
    """
    if name.endswith(".conv1d.weight"):
        return 1.0 / math.sqrt(3 * model.delta_net.conv_size_tokens)
    std = model.init_std * init_factor(name, num_dims, model)
    if model.scale_init_by_depth and _DEPTH_SCALED.search(name):
        return std / math.sqrt(2 * model.num_layers)
    return std


def fill(tensor: torch.Tensor, shard: Shard, model: Model, seed: int) -> None:
    """Write a local tensor's initial values: norms that multiply by 1, zeros for biases and offsets, normal values for others.

    A gated delta net starts as Megatron-Core's does: A uniform in [1, 16), dt_bias 1, convolutions with torch's variance.
    """
    with torch.no_grad():
        if _ONES.search(shard.name):
            is_zero = model.norm == "zero_centered_rmsnorm" and "norm." in shard.name and not _PLAIN_NORM.search(shard.name)
            tensor.fill_(0.0 if is_zero else 1.0)
        elif _ZEROS.search(shard.name):
            tensor.zero_()
        else:
            flat = torch.cat([normal(shard.name, shard.global_shape, slice_, seed).flatten() for slice_ in shard.slices])
            if shard.name.endswith(".A_log"):
                uniform = torch.erf(flat / math.sqrt(2.0)).add(1.0).div(2.0)
                flat = (1.0 + 15.0 * uniform).log()
            else:
                flat = flat * initial_std(shard.name, len(shard.global_shape), model)
            tensor.copy_(flat.view(tensor.shape))


def normal(name: str, global_shape: tuple[int, ...], slice_: TensorSlice, seed: int) -> torch.Tensor:
    """Standard normal float32 values of one slice of a tensor. Shape: slice_.shape. Cost: the full rows of the slice."""
    width = global_shape[-1]
    rows = TensorSlice(slice_.offset[:-1], slice_.shape[:-1])
    if len(global_shape) == 1:
        return _draw(name, slice_.offset[0], slice_.shape[0], seed)
    # Rows of the last two dims are contiguous; leading dims (stacked experts) are walked.
    lead = rows.shape[:-1]
    result = torch.empty(slice_.shape)
    for index in np.ndindex(*lead):
        first = 0
        for dim, (offset, position) in enumerate(zip(rows.offset[:-1], index, strict=True)):
            first += (offset + position) * prod(global_shape[dim + 1 : -1])
        first += rows.offset[-1]
        drawn = _draw(name, first * width, rows.shape[-1] * width, seed).view(rows.shape[-1], width)
        result[index] = drawn[:, slice_.offset[-1] : slice_.offset[-1] + slice_.shape[-1]]
    return result


def _draw(name: str, start: int, count: int, seed: int) -> torch.Tensor:
    """Elements [start, start + count) of the stream of `name`: 24 random bits each, through the inverse normal (|x| < 5.5)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    # One Philox block makes four 64-bit words, eight elements.
    generator.advance(start // 8)
    skip = start % 8
    words = generator.random_raw((count + skip + 1) // 2).astype("<u8", copy=False).view("<i4")[skip : skip + count]
    uniform = torch.from_numpy(words).bitwise_right_shift(8).float().add_(0.5).mul_(2.0**-23)
    return torch.erfinv(uniform).mul_(math.sqrt(2.0))
