"""Megatron-Core without CUDA: what the rewriting of its sources does, and that torch itself stays as it is."""

from __future__ import annotations

import inspect

import pytest
import torch
from megatron.core import jit
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from parallel import cpu


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("torch.cuda.current_device()", "_cuda.current_device()"),
        ("p.type() == 'torch.cuda.FloatTensor'", "p.type() == 'torch.FloatTensor'"),
        ('torch.zeros(3, device="cuda")', "torch.zeros(3, device='cpu')"),
        ("x.to('cuda')", "x.to('cpu')"),
        ("x.cuda()", "x.cpu()"),
        ("x.cuda(torch.cuda.current_device())", "x.cpu()"),
        ("torch.empty(1, pin_memory=True)", "torch.empty(1, pin_memory=False)"),
        ("from torch.cuda import _lazy_call, device as place", "_lazy_call = _cuda._lazy_call; place = _cuda.device"),
        ("barracuda = 'cuda'", "barracuda = 'cuda'"),
    ],
)  # fmt: skip
def test_rewrite(source: str, want: str) -> None:
    assert cpu.rewrite("megatron.core.any", source) == want


def test_a_replacement_that_no_longer_fits_is_our_bug_and_says_so() -> None:
    with pytest.raises(AssertionError, match=r"knows megatron-core 0\.16\.1"):
        cpu.rewrite("megatron.core.jit", "nothing of what stood there")


def test_modules_run_on_the_cpu_and_torch_is_untouched() -> None:
    assert moe_utils.te_general_gemm is None
    assert not multi_latent_attention.HAVE_TE
    assert jit.jit_fuser is jit.noop_decorator
    assert not torch.cuda.is_available() and "parallel" not in inspect.getsourcefile(torch.cuda.current_device)  # type: ignore[operator]
    random.initialize_rng_tracker(force_reset=True)
    tracker = random.get_cuda_rng_tracker()
    tracker.add("test", 7)
    with tracker.fork("test"):
        inside = torch.rand(3)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(7)))
