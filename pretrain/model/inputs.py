"""The model's inputs for one micro-batch. In: a `MicroBatch`. Out: this context rank's tokens and mask, on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.data.batches import MicroBatch
from pretrain.model.attention import zigzag


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of one forward pass. Shapes: b micro-batch, s tokens of this context rank, S tokens of a whole sequence."""

    tokens: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64
    loss_mask: torch.Tensor  # [b, s] float32
    position_ids: torch.Tensor  # [b, s] int64
    attention_mask: torch.Tensor | None  # [b, 1, s, S] bool, True where a query must not look; None: causal


def make_model_inputs(batch: MicroBatch, groups: ProcessGroupCollection, device: torch.device) -> ModelInputs:
    """Take this context rank's tokens and copy them to the device.

    Document masks cost a [b, 1, s, S] tensor of bool.
    """
    positions = zigzag(batch.tokens.shape[1], groups.cp.size(), groups.cp.rank())

    def local(tensor: torch.Tensor) -> torch.Tensor:
        part = tensor if groups.cp.size() == 1 else tensor[:, positions]
        return part.to(device, non_blocking=True)

    mask = None
    if batch.document_ids is not None:
        queries = batch.document_ids[:, positions]
        other = queries[:, :, None] != batch.document_ids[:, None, :]
        later = positions[:, None] < torch.arange(batch.tokens.shape[1])[None, :]
        mask = (other | later)[:, None].to(device)
    return ModelInputs(local(batch.tokens), local(batch.labels), local(batch.loss_mask), local(batch.position_ids), mask)
