"""Which kernels, dispatcher and loss a published run's software has.

In: a row. Out: the settings of PlannedJob that depend on them.

Torch-free.
"""

from __future__ import annotations

import re
from typing import Any

from parallel.memory.hardware import Gpu
from parallel.memory.job import COMPILED_LOGIT_BYTES, EAGER_LOGIT_BYTES, GATHERED_LOGIT_BYTES, LOGIT_BYTES, ZeroSharding

EAGER_ENGINES = ("fsdp", "fsdp2")
# (source, model, GPUs) of runs that send a token once for each of its experts: by Megatron-Bridge's scripts/performance/configs,
# and those of 2024. Others send it once to each rank.
ALL_TO_ALL = (("performance-summary", "Qwen3-235B", ("H100", "B200", "B300")), ("performance-summary", "gpt-oss", ("B200",)),
              ("dgxc-benchmarking", "Grok", ("H100",)))  # fmt: skip


def dispatcher_of(row: dict[str, Any], has_grouped: bool) -> str:
    """How tokens reach their experts: as the row says, else as known of tuned Megatron runs, else by all-to-all."""
    said = f"{row.get('dispatcher') or ''} {row.get('notes') or ''}".lower()
    if re.search(r"deepep|hybridep|\bflex\b", said):
        return "flex"
    if re.search(r"all-?gather dispatch|\ballgather\b", said):
        return "allgather"
    if re.search(r"all-?to-?all", said):
        return "alltoall"
    if has_grouped:
        return "alltoall"
    source, gpu, name = str(row.get("source") or ""), str(row.get("gpu") or ""), str((row.get("model") or {}).get("name") or "")
    known = any(words in source and name.startswith(model) and gpu.startswith(gpus) for words, model, gpus in ALL_TO_ALL)
    return "alltoall" if known else "flex"


def is_pytorch(zero: ZeroSharding, notes: str) -> bool:
    """PyTorch's kernels: PyTorch's own FSDP, unless the row names Transformer Engine."""
    return zero.engine in EAGER_ENGINES and not re.search(r"\bTE\b|Transformer Engine", notes)


def is_compiled(row: dict[str, Any]) -> bool:
    """torch.compile of the whole model, which its async TP and float8 need."""
    words = str(row.get("notes") or "")
    return bool(re.search(r"compile(?! off|\()|async ?TP", words, re.I)) or str(row.get("precision")).startswith("float8")


def has_casts_apart(precision: str) -> bool:
    """Whether PyTorch's products in this format have a scale for each row or block."""
    return bool(re.search(r"rowwise|mxfp|nvfp", precision.lower()))


def has_early_flash(gpu: Gpu, notes: str) -> bool:
    """PyTorch's attention is flash attention 1 on A100 and 2 on Hopper, until cuDNN's became the first choice on Hopper and
    Blackwell (its sdp_utils.cpp): runs of 2026."""
    return gpu.fp4_tflops <= gpu.fp8_tflops and "2026-" not in notes


def has_grouped_launch(zero: ZeroSharding, notes: str) -> bool:
    """PyTorch's grouped product: stacks of FSDP and of torch.compile, unless the row names Transformer Engine's experts."""
    return (zero.engine in EAGER_ENGINES or "torch.compile" in notes) and "TE grouped" not in notes


def logit_bytes(row: dict[str, Any], zero: ZeroSharding, tensor: int) -> float:
    """Bytes of a logit: torchtitan's loss is parallel, and compiled only under torch.compile of the whole step; other stacks of
    FSDP gather the logits of tensor parallel ranks."""
    if "torchtitan" in str(row.get("source")):
        compiled = re.search(r"torch\.compile(?! off)", str(row.get("notes") or ""))
        return COMPILED_LOGIT_BYTES if compiled else EAGER_LOGIT_BYTES
    return GATHERED_LOGIT_BYTES * tensor if zero.engine in EAGER_ENGINES and tensor > 1 else LOGIT_BYTES
