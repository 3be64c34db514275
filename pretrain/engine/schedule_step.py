"""Megatron-Core's pipeline schedules over one global batch. In: chunks and micro-batches. Out: loss sum and token count.

Both engines use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from configs.schema import Config
from parallel.compat.megatron_guards import router_losses_of_all_tokens, without_jitter
from pretrain.data.batches import MicroBatch
from pretrain.data.sources import shown_sources
from pretrain.model.inputs import make_model_inputs


class PipelineSchedule:
    """Runs the forward and backward passes of this rank's micro-batches. The engines own the gradients."""

    def __init__(self, config: Config, groups: ProcessGroupCollection, device: torch.device) -> None:
        self.groups = groups
        self.device = device
        self.micro_batch_seqs = config.batch.micro_batch_seqs
        self.seq_length_tokens = config.batch.seq_length_tokens
        self.has_mtp = config.model.mtp.num_layers > 0
        self.has_experts = config.model.moe.num_experts > 0
        sources = shown_sources(config)
        self.source_names = sources.names
        # [parts, names], 1 where the part's loss counts under the name.
        self._name_of_part = torch.zeros(len(sources.slots), len(sources.names), dtype=torch.float64, device=device)
        for part, slot in enumerate(sources.slots):
            self._name_of_part[part, slot] = 1
        self.source_losses: dict[str, float] = {}

    def run(self, models: Sequence[nn.Module], batches: Sequence[MicroBatch], forward_only: bool) -> tuple[float, int]:
        """(sum of token losses in nats, number of valid tokens) of the global batch, equal on all ranks. Collective.

        Sets `source_losses`: the mean loss of each source that has valid tokens, in nats, by its name.
        """
        run = get_forward_backward_func()
        iterators: list[Iterator[MicroBatch]] = [iter(batches) for _ in models]
        with without_jitter(models) if forward_only else self._router_losses(batches):
            reports = run(
                forward_step_func=self._forward,
                data_iterator=iterators if len(models) > 1 else iterators[0],
                model=list(models),
                num_microbatches=len(batches),
                seq_length=self.seq_length_tokens,
                micro_batch_size=self.micro_batch_seqs,
                forward_only=forward_only,
            )
        return self._reduce(reports)

    def count_tokens(self, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """The number of valid tokens of the global batch, a float64 scalar on the device. Collective over data ranks.

        Context ranks read the same sequences, so they are counted once.
        """
        total = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum().to(self.device)
        dist.all_reduce(total, group=self.groups.dp)
        return total

    def _router_losses(self, batches: Sequence[MicroBatch]) -> AbstractContextManager[None]:
        """A context in which router losses are means over all tokens. Costs one all-reduce of one number."""
        if not self.has_experts:
            return nullcontext()
        all_tokens = sum(batch.loss_mask.numel() for batch in batches) * self.groups.dp.size()
        # Where no token is valid, the engines divide by 1, and so does this share.
        share = self.count_tokens(batches).clamp(min=1) / all_tokens
        return router_losses_of_all_tokens(share.float())

    def _forward(
        self, iterator: Iterator[MicroBatch], model: Any, return_schedule_plan: bool = False
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        """(output of the model, function that reduces it to the loss), as Megatron-Core's schedules expect.

        `return_schedule_plan`: the output is a plan whose parts the schedule runs while tokens are sent to experts
        (parallel.overlap_expert_comm).
        """
        batch = next(iterator)
        inputs = make_model_inputs(batch, self.groups, self.device)
        names = None if batch.parts is None or not self.source_names else self._name_of_part[batch.parts.to(self.device)]
        mtp = {"loss_mask": inputs.loss_mask} if self.has_mtp else {}
        run = model.build_schedule_plan if return_schedule_plan else model
        output = run(inputs.tokens, inputs.position_ids, inputs.attention_mask, labels=inputs.labels, **mtp)
        return output, partial(_loss, inputs.loss_mask, names)

    def _reduce(self, reports: list[torch.Tensor]) -> tuple[float, int]:
        total = torch.zeros(2 + 2 * len(self.source_names), dtype=torch.float64, device=self.device)
        if reports:
            found = torch.stack(reports).sum(dim=0)
            total[: len(found)] += found
            dist.all_reduce(total, group=self.groups.dp_cp)
        last = dist.get_process_group_ranks(self.groups.pp)[-1]
        dist.broadcast(total, src=last, group=self.groups.pp)
        loss_sum, num_tokens, *by_source = total.tolist()
        pairs = zip(self.source_names, by_source[::2], by_source[1::2], strict=True)
        self.source_losses = {name: loss / tokens for name, loss, tokens in pairs if tokens}
        return loss_sum, int(num_tokens)


def _loss(
    loss_mask: torch.Tensor, names: torch.Tensor | None, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token losses [b, s] -> (sum over valid tokens, their number, report float64 of both, then of both for each source).

    `names`: [b, names], 1 under the name of each sequence's source. The engine divides the gradients by the global number of
    valid tokens.
    """
    losses = output.float() * loss_mask
    total = losses.sum()
    num_tokens = loss_mask.sum()
    # The report is a copy, because the schedule may divide the loss in place.
    report = torch.stack([total.detach().double(), num_tokens.double()])
    if names is not None:
        by_sequence = torch.stack([losses.detach().double().sum(dim=1), loss_mask.double().sum(dim=1)], dim=1)
        report = torch.cat([report, (names.T @ by_sequence).flatten()])
    return total, num_tokens.int(), report
