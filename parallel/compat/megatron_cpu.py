"""Megatron-Core without CUDA: its sources are rewritten at import so that `torch.cuda` means the CPU.

In: the source of the listed megatron packages. Out: the same modules, with `torch.cuda` bound to a small CPU namespace.
torch itself is not patched. A TorchFunctionMode would do the same at run time for 18% of every step.
With a GPU present nothing is rewritten: the finder steps aside at the first megatron import.

Torch-free.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import os
import re
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

from configs.errors import ConfigError
from parallel.compat.private_names import changed_source
from parallel.compat.supported import version_problem
from parallel.compat.versions import is_between, megatron_version

PACKAGES = tuple(
    f"megatron.core.{name}"
    for name in (
        "tensor_parallel", "pipeline_parallel", "transformer", "distributed", "optimizer", "models.gpt", "models.common",
        "parallel_state", "utils", "jit", "dist_checkpointing", "fp8_utils", "fusions", "rerun_state_machine",
        "inference.contexts.dynamic_context", "timers",
    )
)  # fmt: skip

_IMPORT = re.compile(r"^from torch\.cuda import (.+)$", re.MULTILINE)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    # p.type() is compared with 'torch.cuda.FloatTensor'; on the CPU its name is 'torch.FloatTensor'.
    (re.compile(r"(['\"])torch\.cuda\.(\w+Tensor)"), r"\1torch.\2"),
    (re.compile(r"\btorch\.cuda\b"), "_cuda"),
    (re.compile(r"(device(?:_type)?(?:: [^=\n]*)?\s*=\s*|torch\.device\(|\.to\(|autocast\()(['\"])cuda(?::\d)?\2"), r"\1'cpu'"),
    # Pinned memory needs a CUDA driver.
    (re.compile(r"pin_memory=True"), "pin_memory=False"),
    (re.compile(r"\.cuda\((?:non_blocking=True|_cuda\.current_device\(\))?\)"), ".cpu()"),
)


@dataclass(frozen=True)
class Replacement:
    """A text that must occur exactly once in a module of the versions `first` to `last`, and what takes its place."""

    old: str
    new: str
    first: str = "0.16.1"
    last: str | None = None


# Module -> its replacements, and why.
_REPLACED: dict[str, tuple[Replacement, ...]] = {
    # Megatron-Core's own metrics, which nothing here calls: 0.9 s of every rank's 6 s of imports.
    "megatron.core.inference.contexts.dynamic_context": (
        Replacement("    import wandb  # pylint: disable=unused-import", "    raise ImportError", last="0.16"),
    ),
    "megatron.core.timers": (Replacement("    import wandb\n", "    raise ImportError\n"),),
    # torch.compile of the router's small functions costs 4-28 s at the first step and gains nothing here.
    "megatron.core.jit": (Replacement("\n\nenable_jit_fuser()", "\n\ndisable_jit_fuser()"),),
    "megatron.core.transformer.moe.moe_utils": (
        # Without Transformer Engine the name stays undefined, and the router's product raises a NameError.
        Replacement(
            "except ImportError:\n    HAVE_TE = False",
            "except ImportError:\n    HAVE_TE = False\n    te_general_gemm = None",
            last="0.16",
        ),
        # Splits must leave as numpy arrays also when they are on the CPU already.
        Replacement("if torch.is_tensor(tensor) and tensor.is_cuda:", "if torch.is_tensor(tensor):"),
    ),
    # A router for inference only, which nothing here builds: the decorator imports torch's compiler, 0.5 s of every rank.
    "megatron.core.transformer.moe.router": (
        Replacement("    @torch.compile\n    def _compiled_topk_routing(", "    def _compiled_topk_routing(", first="0.17"),
    ),
    # Its kernels are made when the module is imported. Nothing here calls them, and a CPU's torch comes without triton.
    "megatron.core.transformer.moe.ops.paged_stash": (
        Replacement(
            "import triton\nimport triton.language as tl\n", "triton = _cuda.triton\ntl = _cuda.triton.language\n", first="0.19"
        ),
    ),
    "megatron.core.transformer.moe.paged_stash": (
        Replacement(
            "import triton\nimport triton.language as tl\n",
            "triton = _cuda.triton\ntl = _cuda.triton.language\n",
            first="0.18",
            last="0.18",
        ),
    ),
    "megatron.core.transformer.multi_latent_attention": (
        # True although Transformer Engine is absent; isinstance(x, None) then raises.
        Replacement("    HAVE_TE = True", "    HAVE_TE = False", last="0.16"),
        # A class that isinstance is asked about, and that is None without Transformer Engine.
        Replacement(
            "    ) = (None, None, None, None, None, None)",
            "    ) = (None, None, None, None, None, None)\n    from megatron.core.post_training.modelopt.layers import Linear",
            first="0.17",
        ),
    ),
    # Takes its default, False, for fp8 being on, whose names are undefined without Transformer Engine (recomputed layer norms).
    "megatron.core.tensor_parallel.random": (
        Replacement("self.fp8 = fp8 is not None", "self.fp8 = False"),
        # Its streams are the CPU's generator here: the warning would come with every dropout.
        Replacement("if not torch.all(cpu_rng_state == torch.get_rng_state()).item():", "if False:"),
    ),
    # Adds to its input in place, which autograd forbids where a reduction over one rank returned it as it came.
    "megatron.core.transformer.mlp": (
        Replacement(
            "output += output_bias.unsqueeze(0) * per_token_scale.unsqueeze(-1)",
            "output = (output + output_bias.unsqueeze(0) * per_token_scale.unsqueeze(-1)).to(output.dtype)",
        ),
    ),
    # The schedule that overlaps experts' tokens is right in fp32 too, in which rehearsals compare.
    "megatron.core.transformer.transformer_config": (
        Replacement(
            "self.bf16 or self.fp16\n            ), 'overlap_moe_expert_parallel_comm",
            "True\n            ), 'overlap_moe_expert_parallel_comm",
        ),
    ),
    # A tensor on the CPU belongs to no stream.
    "megatron.core.models.gpt.fine_grained_callables": (
        Replacement("residual.record_stream(_cuda.current_stream())", "residual"),
        Replacement("shared_expert_output.record_stream(_cuda.current_stream())", "pass", first="0.17"),
    ),
    "megatron.core.pipeline_parallel.utils": (
        Replacement("input.record_stream(self.stream)", "pass"),
        Replacement("g.record_stream(self.stream)", "pass"),
    ),
    # gloo moves equal shares only; experts split over tensor and expert ranks have uneven ones.
    "megatron.core.tensor_parallel.mappings": (
        Replacement(
            "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
            "_cuda.all_gather_uneven(output_tensor_list, input_, group)",
        ),
        Replacement(
            "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",
            "_cuda.reduce_scatter_uneven(output, input_tensor_list, group)",
        ),
    ),
}


def rewrite(name: str, source: str, version: str | None = None) -> str:
    """The CPU version of one megatron module's source. Raises ConfigError where it lacks a text that must be replaced.

    `version`: of the megatron-core that the source is from; None: the installed one.
    """

    def bind(match: re.Match[str]) -> str:
        pairs = [part.strip().split(" as ") for part in match[1].split(",")]
        return "; ".join(f"{pair[-1]} = _cuda.{pair[0]}" for pair in pairs)

    source = _IMPORT.sub(bind, source)
    for pattern, replacement in _REWRITES:
        source = pattern.sub(replacement, source)
    for text in replacements(name, version or megatron_version()):
        if source.count(text.old) != 1:
            raise changed_source(name, text.old)
        source = source.replace(text.old, text.new)
    return source


def replacements(name: str, version: str) -> list[Replacement]:
    """The replacements of one module for a version of megatron-core."""
    return [text for text in _REPLACED.get(name, ()) if is_between(version, text.first, text.last)]


class _Stream:
    """Work on the CPU is done when the call returns: every wait is over, every query is true."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    wait_stream = wait_event = record = synchronize = wait

    def record_event(self, *args: Any) -> _Stream:
        return _Stream()

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = None  # type: ignore[assignment]


def _cpu_namespace() -> SimpleNamespace:
    """What the rewritten modules find under the name `torch.cuda`."""
    import torch  # noqa: PLC0415  (this module is imported where torch must not be)

    cpu = torch.device("cpu")

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    class Generators:
        def __getitem__(self, index: int) -> torch.Generator:
            return torch.default_generator

    def all_gather_uneven(outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any) -> None:
        """outputs[r] gets rank r's `tensor`; lengths of dim 0 differ from rank to rank. Costs padding to the longest."""
        longest = max(len(output) for output in outputs)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        received = [torch.empty_like(padded) for _ in outputs]
        torch.distributed.all_gather(received, padded, group=group)
        for output, full in zip(outputs, received, strict=True):
            output.copy_(full[: len(output)])

    def reduce_scatter_uneven(output: torch.Tensor, tensors: list[torch.Tensor], group: Any) -> None:
        """`output` gets the sum over ranks of tensors[own rank]. Costs an all-reduce of everything."""
        total = torch.cat(tensors)
        torch.distributed.all_reduce(total, group=group)
        output.copy_(total.split([len(tensor) for tensor in tensors])[group.rank()])

    # What the declarations of kernels name. No kernel is called.
    triton = SimpleNamespace(jit=lambda kernel: kernel, language=SimpleNamespace(constexpr=int))

    return SimpleNamespace(
        triton=triton, all_gather_uneven=all_gather_uneven, reduce_scatter_uneven=reduce_scatter_uneven,
        current_device=lambda: cpu, device_count=lambda: 1, set_device=nothing, synchronize=nothing, empty_cache=nothing,
        is_available=lambda: False, is_initialized=lambda: True, is_current_stream_capturing=lambda: False,
        Stream=_Stream, Event=_Stream, current_stream=lambda *a: _Stream(), default_stream=lambda *a: _Stream(),
        stream=lambda stream: contextlib.nullcontext(), device=contextlib.nullcontext,
        get_rng_state=get_rng_state, set_rng_state=set_rng_state, manual_seed=torch.manual_seed,
        default_generators=Generators(), random=SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state),
        FloatTensor=torch.FloatTensor, HalfTensor=torch.HalfTensor, BFloat16Tensor=torch.BFloat16Tensor,
        OutOfMemoryError=torch.OutOfMemoryError, CUDAGraph=torch.cuda.CUDAGraph,
        CUDAPluggableAllocator=getattr(torch.cuda, "CUDAPluggableAllocator", None),
        _lazy_call=lambda call, **kwargs: call(), _lazy_init=nothing,
        nvtx=SimpleNamespace(range_push=nothing, range_pop=nothing, range=lambda *a: contextlib.nullcontext()),
        memory_allocated=zero, max_memory_allocated=zero, memory_reserved=zero, reset_peak_memory_stats=nothing,
    )  # fmt: skip


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module's rewritten source, once for all ranks: 0.8 s of 120 modules otherwise, in each of them."""

    def get_code(self, fullname: str) -> CodeType | None:
        stats = self.path_stats(self.path)
        # What Python's own .pyc begins with: the source that the code was made from.
        head = struct.pack("<4sLLL", importlib.util.MAGIC_NUMBER, 0, int(stats["mtime"]) & 0xFFFFFFFF, stats["size"] & 0xFFFFFFFF)
        cached = Path(importlib.util.cache_from_source(self.path, optimization=_rules_id()))
        with contextlib.suppress(OSError):
            held = cached.read_bytes()
            if held.startswith(head):
                return marshal.loads(held[len(head) :])
        source = self.get_source(fullname)
        assert source is not None, f"{fullname} has no source to rewrite"
        code = compile(rewrite(fullname, source), self.path, "exec", dont_inherit=True)
        self._keep(cached, head + marshal.dumps(code))
        return code

    def _keep(self, cached: Path, content: bytes) -> None:
        """Beside Python's own, whole or not at all. Where packages can't be written to, the next rank compiles again."""
        if sys.dont_write_bytecode:
            return
        beside = cached.with_name(f"{cached.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            cached.parent.mkdir(exist_ok=True)
            beside.write_bytes(content)
            beside.replace(cached)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_cuda"] = _namespace()
        super().exec_module(module)


@functools.cache
def _rules_id() -> str:
    """Part of the cached code's name: other rules or another version, other code."""
    return f"phalanx{zlib.crc32(Path(__file__).read_bytes() + megatron_version().encode()):08x}"


class _Finder(importlib.abc.MetaPathFinder):
    """Takes the listed megatron modules when this process has no CUDA device."""

    def __init__(self) -> None:
        self.active: bool | None = None
        self.namespace: SimpleNamespace | None = None

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        if self.active is None:
            if problem := version_problem("megatron-core"):
                raise ConfigError(problem)
            self.active = not cuda_available()
        if not self.active or not fullname.startswith(PACKAGES):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


_FINDER = _Finder()


def _namespace() -> SimpleNamespace:
    if _FINDER.namespace is None:
        _FINDER.namespace = _cpu_namespace()
    return _FINDER.namespace


def cuda_available() -> bool:
    import torch  # noqa: PLC0415  (this module is imported where torch must not be)

    return torch.cuda.is_available()


def register() -> None:
    """Put the finder in front of Python's own, once. Megatron modules imported before this are a bug of ours."""
    if _FINDER in sys.meta_path:
        return
    # Six lines a rank that say what is known: no Transformer Engine, no apex, names that newer torch calls otherwise.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    early = [name for name in sys.modules if name.startswith("megatron.core")]
    assert not early, f"{early[0]} was imported before parallel: import a module of ours first"
    sys.meta_path.insert(0, _FINDER)
