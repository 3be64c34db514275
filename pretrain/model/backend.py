"""The implementation of the model on this machine: local modules on a CPU, Transformer Engine on a GPU.

In: the config and what the process found. Out: a `Backend`, or the problems of a config that this machine can't run.
`choose_backend` alone decides. All code that depends on the machine reads its result.

Torch-free.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from configs.errors import Problem
from configs.schema import Config
from parallel.architecture import expert_ffn, has_delta_net

# torch's grouped product requires that every row of a matrix starts at a multiple of this.
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Backend:
    """The choice of kernels.

    `transformer_engine`: use its layers and fused kernels. `grouped_experts`: one product for all local experts, by
    Transformer Engine or by pretrain/model/experts.py. `fused_wgrad`: the kernel of the product adds weight gradients.
    `fp8`: Megatron-Core's name of the fp8 format. `token_kernels`: the kernels that send tokens to experts under
    model.moe.dispatcher = flex, by Megatron-Core's name. `delta_kernel`: flash-linear-attention computes gated delta nets.
    """

    transformer_engine: bool
    grouped_experts: bool
    fused_wgrad: bool
    fp8: str | None
    token_kernels: str | None = None
    delta_kernel: bool = False


@dataclass(frozen=True)
class DetectedMachine:
    """The devices and packages of a process. `token_kernels`: installed kernels for the flex dispatcher, best first.

    `delta_kernel`: flash-linear-attention is installed, and the process has a GPU for it.
    """

    cuda: bool
    transformer_engine: bool
    fused_wgrad: bool
    token_kernels: tuple[str, ...] = ()
    delta_kernel: bool = False


def detect_machine(cuda: bool) -> DetectedMachine:
    """The packages that this process can import. `cuda`: whether it computes on a GPU."""
    return DetectedMachine(
        cuda,
        _has("transformer_engine"),
        _has("fused_weight_gradient_mlp_cuda"),
        _token_kernels() if cuda else (),
        cuda and _has("fla"),
    )


def _token_kernels() -> tuple[str, ...]:
    """The installed kernels of the package deep_ep, best first.

    HybridEP handles scale-up domains of any size, DeepEP domains of 8 GPUs. Each has a compiled module of its own.
    """
    halves = {"hybridep": "hybrid_ep_cpp", "deepep": "deep_ep_cpp"}
    return tuple(name for name, half in halves.items() if _has(half))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_backend(config: Config, machine: DetectedMachine) -> list[Problem]:
    """Problems of a config that needs what this machine lacks."""
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


def choose_backend(config: Config, machine: DetectedMachine) -> Backend:
    """The backend on this machine of a config for which `check_backend` finds no problem."""
    wanted = config.model.moe.grouped_gemm
    possible = machine.cuda or not _why_not_grouped(config)
    return Backend(
        transformer_engine=machine.cuda,
        grouped_experts=bool(config.model.moe.num_experts) and wanted != "off" and possible,
        # The kernel adds to Megatron-Core's main_grad, which DeepSpeed's parameters lack.
        fused_wgrad=machine.cuda and machine.fused_wgrad and config.zero.engine == "megatron",
        fp8=None if config.precision.fp8 == "none" else config.precision.fp8,
        token_kernels=machine.token_kernels[0] if config.model.moe.dispatcher == "flex" else None,
        # The kernel computes its products in bf16. A model in fp32 keeps the path in torch.
        delta_kernel=machine.delta_kernel and has_delta_net(config.model) and config.precision.params == "bf16",
    )


def _why_not_grouped(config: Config) -> str | None:
    """The reason why experts must be separate modules on a CPU. None: a grouped product gives the same result, faster."""
    model = config.model
    if model.mlp_bias or model.activation == "gpt_oss_glu":
        return "experts have biases or gpt-oss's activation"
    size = 2 if config.precision.params == "bf16" else 4
    for name, width in (("hidden_size", model.hidden_size), ("an expert's inner width", expert_ffn(model))):
        if width * size % (_ALIGNMENT_BYTES * config.parallel.expert_tensor):
            return f"{name} {width} is no multiple of {_ALIGNMENT_BYTES // size} on each expert-tensor rank"
    return None
