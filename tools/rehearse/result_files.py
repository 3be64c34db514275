"""What a rank computed, as a file that another interpreter reads: an npz archive of plain arrays, nothing pickled.

Pickles of arrays do not pass between numpy 1 and numpy 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.model.tensor_slice import TensorSlice
from tools.rehearse.train_rank import RankResult, SliceKey

_TENSORS = ("initial", "gradients", "weights")
_NUMBERS = ("losses", "grad_norms", "source_losses", "near_ties")
_HEAD = "head"


def save_results(ranks: Sequence[RankResult], path: Path) -> None:
    """Write the results of all ranks of one layout."""
    arrays: dict[str, NDArray[Any]] = {}
    heads: list[dict[str, Any]] = []
    for rank, result in enumerate(ranks):
        head: dict[str, Any] = {name: getattr(result, name) for name in _NUMBERS}
        for kind in _TENSORS:
            tensors: dict[SliceKey, NDArray[np.float32]] = getattr(result, kind)
            head[kind] = [_key_as_json(key) for key in tensors]
            arrays |= {f"{rank}.{kind}.{index}": values for index, values in enumerate(tensors.values())}
        heads.append(head)
    arrays[_HEAD] = np.array(json.dumps(heads))
    np.savez(path, allow_pickle=False, **arrays)


def load_results(path: Path) -> list[RankResult]:
    """Read what `save_results` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        heads = json.loads(str(archive[_HEAD]))
        results = []
        for rank, head in enumerate(heads):
            result = RankResult(**{name: head[name] for name in _NUMBERS})
            for kind in _TENSORS:
                keys = map(_key_of, head[kind])
                setattr(result, kind, {key: archive[f"{rank}.{kind}.{index}"] for index, key in enumerate(keys)})
            results.append(result)
    return results


def _key_as_json(key: SliceKey) -> list[Any]:
    name, shape, slice_, start, stop = key
    return [name, shape, slice_.offset, slice_.shape, start, stop]


def _key_of(row: list[Any]) -> SliceKey:
    name, shape, offset, slice_shape, start, stop = row
    return name, tuple(shape), TensorSlice(tuple(offset), tuple(slice_shape)), start, stop
