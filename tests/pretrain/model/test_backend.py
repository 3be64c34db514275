"""One pure function decides which implementation runs."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.model.backend import Backend, DetectedMachine, check_backend, choose_backend
from tests.pretrain.world import small_config

CPU = DetectedMachine(cuda=False, transformer_engine=False, fused_wgrad=False)
GPU = DetectedMachine(cuda=True, transformer_engine=True, fused_wgrad=True)
FLEX = {"model__moe__dispatcher": "flex"}


@pytest.mark.parametrize(
    ("machine", "changes", "want"),
    [
        (CPU, {}, Backend(False, True, False, None)),
        (CPU, {"model__moe__grouped_gemm": "off"}, Backend(False, False, False, None)),
        (CPU, {"model__moe__ffn_hidden_size": 22}, Backend(False, False, False, None)),
        (CPU, {"parallel__expert_tensor": 4, "model__moe__ffn_hidden_size": 24}, Backend(False, False, False, None)),
        (CPU, {"model__mlp_bias": True}, Backend(False, False, False, None)),
        (CPU, {"model__moe__num_experts": 0}, Backend(False, False, False, None)),
        (GPU, {}, Backend(True, True, True, None)),
        (GPU, {"model__moe__grouped_gemm": "off", "precision__fp8": "hybrid"}, Backend(True, False, True, "hybrid")),
        (DetectedMachine(True, True, False), {}, Backend(True, True, False, None)),
        (DetectedMachine(True, True, True, ("hybridep", "deepep")), {}, Backend(True, True, True, None)),
        (DetectedMachine(True, True, True, ("hybridep", "deepep")), FLEX, Backend(True, True, True, None, "hybridep")),
        (DetectedMachine(True, True, True, ("deepep",)), FLEX, Backend(True, True, True, None, "deepep")),
    ],
)
def test_choice(machine: DetectedMachine, changes: dict[str, Any], want: Backend) -> None:
    config = small_config(**changes)
    assert check_backend(config, machine) == []
    assert choose_backend(config, machine) == want


@pytest.mark.parametrize(
    ("machine", "changes", "path"),
    [
        (DetectedMachine(True, False, False), {}, "cluster.device"),
        (CPU, {"precision__fp8": "e4m3"}, "precision.fp8"),
        (GPU, FLEX, "model.moe.dispatcher"),
        (CPU, {"model__moe__grouped_gemm": "on", "model__moe__ffn_hidden_size": 22}, "model.moe.grouped_gemm"),
    ],
)
def test_what_a_machine_lacks_is_named(machine: DetectedMachine, changes: dict[str, Any], path: str) -> None:
    (problem,) = check_backend(small_config(**changes), machine)
    assert problem.path == path and problem.fix
