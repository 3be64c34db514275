"""Why sparse attention is not trained: what parallel/legality/sparse_attention.py says of megatron-core holds."""

from __future__ import annotations

import inspect

import pytest
import torch
from megatron.core import __version__
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.experimental_attention_variant.dsa import rotate_activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_indexer_needs_a_gpu(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match=r"fast_hadamard_transform|bf16"):
        rotate_activation(torch.ones(2, 128, dtype=dtype))


@pytest.mark.skipif(__version__ != "0.16.1", reason="later versions set the scale")
def test_the_indexers_loss_is_not_divided_by_the_number_of_micro_batches() -> None:
    source = inspect.getsource(schedules)
    assert "MoEAuxLossAutoScaler.set_loss_scale" in source and "DSAIndexerLossAutoScaler" not in source
