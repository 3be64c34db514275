"""Which implementation of the same model runs here: local modules on the CPU, Transformer Engine on a GPU.

One pure function decides; everything that depends on the machine asks its result.

Torch-free.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from configs.errors import Problem
from configs.schema import Config
from parallel.architecture import expert_ffn

# torch's grouped product wants rows that start at multiples of this.
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Backend:
    """`transformer_engine`: its layers and fused kernels. `grouped_experts`: one product for all local experts, by
    Transformer Engine or by pretrain/model/experts.py. `fused_wgrad`: weight gradients are added in the product's kernel.
    `token_kernels`: who carries tokens for model.moe.dispatcher = flex, by Megatron-Core's name."""

    transformer_engine: bool
    grouped_experts: bool
    fused_wgrad: bool
    fp8: str | None
    token_kernels: str | None = None


@dataclass(frozen=True)
class Machine:
    """What a process finds where it runs. `token_kernels`: those for model.moe.dispatcher = flex, best first."""

    cuda: bool
    transformer_engine: bool
    fused_wgrad: bool
    token_kernels: tuple[str, ...] = ()


def detect_machine(cuda: bool) -> Machine:
    """The packages of this process."""
    return Machine(cuda, _has("transformer_engine"), _has("fused_weight_gradient_mlp_cuda"), _token_kernels() if cuda else ())


def _token_kernels() -> tuple[str, ...]:
    """HybridEP, which knows scale-up domains of any size, before DeepEP, which is made for 8 GPUs: the package deep_ep, told
    apart by its compiled halves."""
    halves = {"hybridep": "hybrid_ep_cpp", "deepep": "deep_ep_cpp"}
    return tuple(name for name, half in halves.items() if _has(half))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_backend(config: Config, machine: Machine) -> list[Problem]:
    """What the config needs and this machine lacks."""
    problems = []
    if machine.cuda and not machine.transformer_engine:
        fix = "pip install --no-build-isolation 'transformer-engine[pytorch]', or hide the GPUs: CUDA_VISIBLE_DEVICES="
        problems.append(Problem("cluster.device", "cuda", "training on a GPU needs Transformer Engine", fix))
    if config.precision.fp8 != "none" and not machine.cuda:
        rule = "fp8 products need a GPU with Transformer Engine"
        problems.append(Problem("precision.fp8", config.precision.fp8, rule, "set precision.fp8=none here"))
    if config.model.moe.dispatcher == "flex" and not machine.token_kernels:
        fix = "install DeepEP (its branch hybrid-ep has both), or set model.moe.dispatcher=alltoall"
        problems.append(Problem("model.moe.dispatcher", "flex", "needs DeepEP's or HybridEP's kernels (package deep_ep)", fix))
    if not machine.cuda and config.model.moe.grouped_gemm == "on" and (reason := _why_not_grouped(config)):
        rule = f"on the CPU the grouped product is not possible: {reason}"
        problems.append(Problem("model.moe.grouped_gemm", "on", rule, "set model.moe.grouped_gemm=auto"))
    return problems


def choose_backend(config: Config, machine: Machine) -> Backend:
    """The backend for a config without problems on this machine."""
    wanted = config.model.moe.grouped_gemm
    possible = machine.cuda or not _why_not_grouped(config)
    return Backend(
        transformer_engine=machine.cuda,
        grouped_experts=bool(config.model.moe.num_experts) and wanted != "off" and possible,
        # The kernel adds to Megatron-Core's main_grad, which DeepSpeed's parameters lack.
        fused_wgrad=machine.cuda and machine.fused_wgrad and config.zero.engine == "megatron",
        fp8=None if config.precision.fp8 == "none" else config.precision.fp8,
        token_kernels=machine.token_kernels[0] if config.model.moe.dispatcher == "flex" else None,
    )


def _why_not_grouped(config: Config) -> str | None:
    """Why experts must be separate modules on the CPU; None: one product for all of them is exact and faster."""
    model = config.model
    if model.mlp_bias or model.activation == "gpt_oss_glu":
        return "experts have biases or gpt-oss's activation"
    size = 2 if config.precision.params == "bf16" else 4
    for name, width in (("hidden_size", model.hidden_size), ("an expert's inner width", expert_ffn(model))):
        if width * size % (_ALIGNMENT_BYTES * config.parallel.expert_tensor):
            return f"{name} {width} is no multiple of {_ALIGNMENT_BYTES // size} on each expert-tensor rank"
    return None
