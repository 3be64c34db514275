"""Megatron-Core's compiled helpers of its data sets, without Megatron-Core: importing that takes seconds, and torch.

In: shares, or lengths of sequences. Out: the arrays that Megatron-Core fills. The extension is the file
megatron/core/datasets/helpers_cpp of the installed package; it needs numpy alone.

Torch-free.
"""

from __future__ import annotations

from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

# The thread that reads ahead and the main thread may both be the first. A second load would return a half-made module.
_LOADING = Lock()


def _extension() -> Any:
    with _LOADING:
        return _load()


@cache
def _load() -> Any:
    """The compiled module. `find_spec` of a top-level package doesn't run the package."""
    package = find_spec("megatron")
    folders = [str(Path(root) / "core" / "datasets") for root in (package.submodule_search_locations or ())] if package else []
    spec = PathFinder.find_spec("helpers_cpp", folders)
    if spec is None or spec.loader is None:
        raise ImportError("megatron-core has no compiled megatron.core.datasets.helpers_cpp; install its wheel")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blending_indices(shares: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(part int16 [size], number in the part int64 [size]) of the first `size` samples of a blend. `shares`: float64, sum 1."""
    parts, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    _extension().build_blending_indices(parts, numbers, shares, len(shares), size, False)
    return parts, numbers


def sample_starts(lengths: np.ndarray, order: np.ndarray, seq_length_tokens: int, tokens: int) -> np.ndarray:
    """Where each sample of one epoch begins and the last one ends: (index into `order`, offset), [samples + 1, 2].

    `lengths`: int32, tokens of every sequence. `order`: int32, the sequences that are read. `tokens`: their sum.
    """
    largest = max(len(order), int(lengths.max()))
    helpers = _extension()
    build = helpers.build_sample_idx_int32 if largest <= np.iinfo(np.int32).max else helpers.build_sample_idx_int64
    return build(np.array(lengths), order, seq_length_tokens, 1, tokens, True, 1)
