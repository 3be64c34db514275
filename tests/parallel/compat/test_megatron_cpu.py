"""Megatron-Core without CUDA: what the rewriting of its sources does, and that torch itself stays as it is."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import jit
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from configs.errors import ConfigError
from parallel.compat import megatron_cpu as cpu


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
def test_rewritten_sources(source: str, want: str) -> None:
    assert cpu.rewrite("megatron.core.any", source) == want


def test_a_replacement_that_no_longer_fits_is_our_bug_and_says_so() -> None:
    with pytest.raises(ConfigError, match=r"knows megatron-core 0\.16\.1"):
        cpu.rewrite("megatron.core.jit", "nothing of what stood there")


def test_modules_run_on_the_cpu_and_torch_is_untouched() -> None:
    assert moe_utils.te_general_gemm is None
    assert not multi_latent_attention.HAVE_TE
    assert jit.jit_fuser is jit.noop_decorator
    assert not torch.cuda.is_available() and "parallel" not in inspect.getsourcefile(torch.cuda.current_device)  # type: ignore[operator]
    random.initialize_rng_tracker(force_reset=True)
    tracker = random.get_cuda_rng_tracker()
    assert tracker is not None
    tracker.add("test", 7)
    with tracker.fork("test"):
        inside = torch.rand(3)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_rewritten_code_is_kept_beside_pythons_own_and_made_anew_when_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    source = tmp_path / "module.py"

    def load(text: str | None = None) -> Any:
        if text is not None:
            source.write_text(text)
        namespace: dict[str, Any] = {}
        exec(cpu._Loader("megatron.core.module", str(source)).get_code("megatron.core.module"), namespace)  # type: ignore[arg-type]
        return namespace["device"]

    assert load("device = 'x'; device = 'cuda'\n") == "cpu"
    (kept,) = (tmp_path / "__pycache__").iterdir()
    assert ".opt-phalanx" in kept.name, "never taken by a process that has a GPU"
    kept.write_bytes(kept.read_bytes().replace(b"cpu", b"CPU"))
    assert load() == "CPU", "read, not compiled"
    assert load("device = 'another'\n") == "another"
    kept.unlink()
    (tmp_path / "__pycache__").rmdir()
    (tmp_path / "__pycache__").write_text("no folder")
    assert load() == "another", "where nothing can be kept it is compiled again"
