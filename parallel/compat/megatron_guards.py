"""The libraries' silent faults that a composed layout would meet, and what keeps each of them away.

Each guard names library, version and symptom, and has a test that fails without it. Faults that only exist without CUDA
are mended where Megatron-Core is prepared for the CPU (parallel/compat/megatron_cpu.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import nn

from parallel.compat.private_names import replaced, require_names
from parallel.compat.versions import megatron_is_between
from parallel.layout import Layout

require_names(__name__)


def mark_expert_parameters(chunks: Sequence[nn.Module], groups: ProcessGroupCollection) -> None:
    """Make Megatron-Core reduce and count the gradients of routed experts over the expert grid, whatever the degrees.

    All three faults: megatron-core, wrong from the first step, no error.
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
    """Validation without the router's noise: megatron-core adds it whether or not the model trains.

    The held-out loss would differ from time to time, and each validation move the random state that training goes on with.
    """
    config = get_model_config(models[0])
    jitter, config.moe_input_jitter_eps = config.moe_input_jitter_eps, None
    try:
        yield
    finally:
        config.moe_input_jitter_eps = jitter


@contextmanager
def router_losses_of_all_tokens(share: torch.Tensor) -> Iterator[None]:
    """Give router losses the weight that their definitions have, whatever labels are masked. `share`: see below; one number.

    The loss of the language model is a mean over the valid tokens of the global batch. Router losses are means over all
    tokens that are routed, masked labels or not: Switch Transformer (arXiv 2101.03961, equation 4) and ST-MoE (arXiv
    2202.08906, equation 5) sum over the tokens of a batch. The tokens of a masked label load experts like any other.

    Fault (megatron-core, with calculate_per_token_loss): it adds router losses times all tokens, and divides
    gradients by the valid ones. Symptom: their weight grows with the number of masked labels. `share` is valid tokens over
    all tokens of the global batch, and takes that back.
    """
    set_loss_scale = MoEAuxLossAutoScaler.set_loss_scale

    def set_share(scale: torch.Tensor) -> None:
        set_loss_scale(scale * share)

    with replaced(MoEAuxLossAutoScaler, "set_loss_scale", staticmethod(set_share)):
        yield


def router_loss_weight(layout: Layout) -> int:
    """Factor on the coefficients of the router's losses.

    megatron-core up to 0.18: with calculate_per_token_loss a router's auxiliary loss is weighted by the rank's own tokens,
    while tensor (sequence) and context ranks share one micro-batch: its gradient is too small by tensor x context, no error.
    From 0.19 on the factor is in the library, and another one would make the gradient too large.
    """
    return layout.tensor * layout.context if megatron_is_between("0.16.1", "0.18") else 1


def yarn_on_part_of_head(whole: Any, fraction: float, transformer: TransformerConfig) -> YarnRotaryEmbedding:
    """YaRN over the first `fraction` of each head, with the settings of `whole`.

    Fault (megatron-core): its YaRN reads no rotary_percent and turns whole heads, without an error.
    """
    return YarnRotaryEmbedding(
        kv_channels=int(whole.dim * fraction),
        rotary_base=whole.rotary_base,
        use_cpu_initialization=transformer.use_cpu_initialization,
        scaling_factor=whole.scaling_factor,
        original_max_position_embeddings=whole.original_max_position_embeddings,
        beta_fast=whole.beta_fast,
        beta_slow=whole.beta_slow,
        mscale=whole.mscale,
        mscale_all_dim=whole.mscale_all_dim,
        correction_range_round_to_int=whole.correction_range_round_to_int,
    )
