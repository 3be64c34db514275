"""Private parts of torch that our code reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from parallel.compat.torch_private import saved_buffers

ROOT = Path(__file__).resolve().parents[3]


def test_saved_buffers_are_those_of_a_state_dict() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("made_anew", torch.ones(2), persistent=False)
    module.register_buffer("absent", None)
    module.child = nn.BatchNorm1d(3)
    module.weight = nn.Parameter(torch.ones(1))
    assert [name for name, _ in saved_buffers(module)] == ["kept"]
    assert {"kept"} == {name for name in module.state_dict() if "." not in name} - {"weight"}
    assert dict(saved_buffers(module))["kept"] is module.kept


def test_dynamo_is_there_before_ranks_are_forked() -> None:
    code = "import sys, tools.rehearse.local_ranks; assert 'torch._dynamo' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
