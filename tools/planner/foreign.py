"""Engines of others as plans: PyTorch's FSDP2 and Megatron-FSDP. No engine here runs them.

In: a PlannedJob of a legal config. Out: the same layout as that engine would hold and time it.

Torch-free.
"""

from __future__ import annotations

from dataclasses import replace

from parallel.memory.job import GATHERED_LOGIT_BYTES, BytesPerParameter, PlannedJob, ZeroSharding

FSDP2, MEGATRON_FSDP = "fsdp2", "megatron_fsdp"
FOREIGN_ENGINES = (FSDP2, MEGATRON_FSDP)
# fp32 weights are sharded and gathered in bf16; gradients are fp32; Adam keeps two fp32 moments.
PYTORCH_STATES = BytesPerParameter(4, 4, 8)


def as_engine(job: PlannedJob, engine: str) -> PlannedJob:
    """The job under an engine of FOREIGN_ENGINES: weights, gradients and optimizer state divided over data parallel ranks.

    fsdp2 computes with PyTorch's kernels, uncompiled, and the attention of its present releases. It waits for tensor parallel
    traffic and gathers the logits of tensor parallel ranks. It
    keeps the gradients of accumulated micro-batches whole in fp32 and reduces them after the last one. megatron_fsdp has
    Megatron-Core's kernels and number formats, and reduces after every micro-batch.
    """
    if engine == MEGATRON_FSDP:
        return replace(job, zero=ZeroSharding("megatron", 3))
    tensor = job.layout.tensor
    return replace(
        job,
        zero=ZeroSharding("fsdp2", 3),
        states=PYTORCH_STATES,
        eager=True,
        grouped_launch=True,
        tensor_waits=tensor > 1,
        logit_bytes=GATHERED_LOGIT_BYTES * tensor if tensor > 1 else job.logit_bytes,
    )


def foreign_note(engine: str) -> str:
    """What a reader must know beside such a plan."""
    return f"planned as {engine} would run it: Phalanx has no such engine, so `phalanx launch` can't run this plan"
