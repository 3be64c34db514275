"""Which implementation of the same model runs here: local modules on the CPU, Transformer Engine on a GPU. [p]

One pure function decides; everything that depends on the machine asks its result.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from configs.schema import Config


@dataclass(frozen=True)
class Backend:
    """`transformer_engine`: its layer spec and fused kernels. `grouped_experts`: one product for all local experts."""

    transformer_engine: bool
    grouped_experts: bool
    fused_wgrad: bool
    fp8: str | None


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def choose_backend(config: Config, cuda: bool, transformer_engine: bool, fused_wgrad: bool) -> Backend:
    """The backend for this config on a machine with or without CUDA, Transformer Engine and the fused weight-gradient kernel.

    Raises RuntimeError when the config needs what the machine lacks; `phalanx check` says so earlier where it can know.
    """
    fp8 = None if config.precision.fp8 == "none" else config.precision.fp8
    if cuda and not transformer_engine:
        raise RuntimeError("training on a GPU needs Transformer Engine: pip install transformer-engine[pytorch]")
    if fp8 and not cuda:
        raise RuntimeError(f"precision.fp8 = {fp8} needs a GPU with Transformer Engine")
    grouped = config.model.moe.grouped_gemm
    # On the CPU separate products are as fast as a grouped one, which falls back to the same loop there.
    return Backend(cuda, (cuda if grouped == "auto" else grouped == "on"), cuda and fused_wgrad, fp8)


def detect_backend(config: Config, cuda: bool) -> Backend:
    """`choose_backend` for the packages of this process."""
    return choose_backend(config, cuda, has_package("transformer_engine"), has_package("fused_weight_gradient_mlp_cuda"))
