"""The libraries' silent faults that a composed layout would meet, and what keeps each of them away.

Each guard names library, version and symptom, and has a test that fails without it. Faults that only exist without CUDA
are mended where Megatron-Core is prepared for the CPU (parallel/compat/megatron_cpu.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import nn


def mark_expert_parameters(chunks: Sequence[nn.Module], groups: ProcessGroupCollection) -> None:
    """Make Megatron-Core reduce and count the gradients of routed experts over the expert grid, whatever the degrees.

    All three faults: megatron-core 0.16.1, wrong from the first step, no error.
    1. With tensor > 1 and expert = 1 experts keep `allreduce=True`: their gradients are summed over data ranks only, though
       every tensor rank sent them other tokens.
    2. With sequence parallelism the bias of an expert's second product is marked `sequence_parallel`: its gradient, complete
       after the expert-data reduction, is summed over tensor ranks once more.
    3. That bias is not marked as split, so the gradient norm counts it on tensor rank 0 alone, though with expert > 1 other
       tensor ranks hold the biases of other experts.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".mlp.experts." not in name:
                continue
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            if groups.expt_tp.size() == 1 and not getattr(parameter, "tensor_model_parallel", False):
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                parameter.partition_dim = 0  # type: ignore[attr-defined]
                parameter.partition_stride = 1  # type: ignore[attr-defined]


@contextmanager
def without_jitter(models: Sequence[nn.Module]) -> Iterator[None]:
    """Validation without the router's noise: megatron-core 0.16.1 adds it whether or not the model trains.

    The held-out loss would differ from time to time, and each validation move the random state that training goes on with.
    """
    config = get_model_config(models[0])
    jitter, config.moe_input_jitter_eps = config.moe_input_jitter_eps, None
    try:
        yield
    finally:
        config.moe_input_jitter_eps = jitter
