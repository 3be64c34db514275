"""Engines of others as plans: PyTorch's FSDP2 and Megatron-FSDP. No engine here runs them.

In: a config and its PlannedJob. Out: the same layout as that engine would hold and time it.

Torch-free.
"""

from __future__ import annotations

from dataclasses import replace

from configs.schema import Config, Recompute, Zero
from parallel.memory.job import GATHERED_LOGIT_BYTES, BytesPerParameter, PlannedJob, ZeroSharding

FSDP2, MEGATRON_FSDP = "fsdp2", "megatron_fsdp"
FOREIGN_ENGINES = (FSDP2, MEGATRON_FSDP)
# fp32 weights are sharded and gathered in bf16; gradients are fp32; Adam keeps two fp32 moments.
PYTORCH_STATES = BytesPerParameter(4, 4, 8)


def foreign_config(config: Config, engine: str) -> Config:
    """The config without what an engine of FOREIGN_ENGINES does not read: the `zero` section, and under fsdp2
    Megatron-Core's schedule that sends tokens to their experts beside another micro-batch. Megatron-FSDP runs in that schedule
    (NVIDIA/Megatron-LM pull request 3797)."""
    overlaps = config.parallel.overlap_expert_comm and engine != FSDP2
    return replace(config, zero=Zero(), parallel=replace(config.parallel, overlap_expert_comm=overlaps))


def pytorch_recomputations(config: Config) -> list[Recompute]:
    """Activation checkpointing as stacks of FSDP2 have it, lightest first: none, every second layer, every layer.

    The plan counts the first half of each chunk in place of every second layer: it is as much."""
    parallel = config.parallel
    layers = config.model.num_layers // (parallel.pipeline * (parallel.virtual_pipeline or 1))
    half = [Recompute(mode="full", method="block", num_layers=layers // 2)] if layers > 1 else []
    return [Recompute(mode="none"), *half, Recompute(mode="full", method="uniform", num_layers=1)]


def as_engine(job: PlannedJob, engine: str) -> PlannedJob:
    """The job under an engine of FOREIGN_ENGINES: weights, gradients and optimizer state divided over data parallel ranks.

    fsdp2 computes with PyTorch's kernels, uncompiled, and the attention of its present releases. It waits for tensor parallel
    traffic and gathers the logits of tensor parallel ranks. It keeps the gradients of accumulated micro-batches whole in fp32 and
    reduces them after the last one. It divides gathered weights again after each pass, also with a pipeline. megatron_fsdp has
    Megatron-Core's kernels and number formats, hides tensor parallel traffic, and reduces after every micro-batch.
    """
    if engine == MEGATRON_FSDP:
        return replace(job, zero=ZeroSharding("megatron", 3), tensor_waits=False)
    tensor = job.layout.tensor
    return replace(
        job,
        zero=ZeroSharding("fsdp2", 3),
        states=PYTORCH_STATES,
        eager=True,
        grouped_launch=True,
        logit_bytes=GATHERED_LOGIT_BYTES * tensor if tensor > 1 else job.logit_bytes,
    )


def foreign_mark(engine: str | None) -> dict[str, object]:
    """What the JSON of a plan or search as this engine says of it, nothing for engines of ours."""
    return {"engine": engine, "runnable": False} if engine else {}


def foreign_facts(engine: str | None) -> list[list[str | None]]:
    """The same as a tile of a page."""
    return [["engine", f"{engine}: not runnable here"]] if engine else []


def foreign_note(engine: str) -> str:
    """What a reader must know beside such a plan."""
    return f"planned as {engine} would run it: Phalanx has no such engine, so `phalanx launch` can't run this plan"
