"""One rank of a rehearsal: real optimizer steps on random tokens with random loss masks.

In: the shrunken config. Out: losses and norms, this rank's slices of the gradients of the first step, and of the weights before
the first and after the last step. Gradients are read from Adam's first moment after one step, which is (1 - beta1) times the
clipped gradient in every engine, and from Muon's momentum, which is (1 - momentum) times it. The norm that the engine reports
undoes the clipping.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from numpy.typing import NDArray

from configs.schema import Config
from parallel.compat.megatron_private import watch_routing
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from pretrain.data.batches import MicroBatch
from pretrain.data.streams import source_paths
from pretrain.engine.base import MOMENTS, MOMENTUM, WEIGHT, Engine, StepResult
from pretrain.model.tensor_slice import TensorSlice
from tools.rehearse.shrink import VOCAB_SIZE

# Scores closer than this may change their order when additions are done in another order.
NEAR_TIE = 1e-6

# (name, shape of the whole tensor, slice, first and last element of the slice)
SliceKey = tuple[str, tuple[int, ...], TensorSlice, int, int]


@dataclass
class RankResult:
    """What one rank computed.

    `source_losses`: of the sources of a blend, step after step.
    `initial`: its slices of the weights before the first step. `near_ties`: expert choices that rounding could change.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    source_losses: list[float] = field(default_factory=list)
    initial: dict[SliceKey, NDArray[np.float32]] = field(default_factory=dict)
    gradients: dict[SliceKey, NDArray[np.float32]] = field(default_factory=dict)
    weights: dict[SliceKey, NDArray[np.float32]] = field(default_factory=dict)
    near_ties: int = 0


def train(config: Config, steps: int) -> RankResult:
    """Train `steps` steps. Collective over the ranks of the layout."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    layout = make_layout(config)
    runtime = start(os.environ)
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, VOCAB_SIZE, config.parallel.pipeline_split)
    groups = make_groups(layout, config.run.seed)
    model = make_model(config, VOCAB_SIZE, layout, chunks, groups, runtime.device)
    engine = make_engine(config, model, groups, runtime.device)
    margins = [record_router_margins(module) for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)]
    trained = RankResult(initial=_slices(engine, WEIGHT, 1.0))
    for step in range(steps):
        result = engine.step(random_batches(config, step, groups.dp.rank(), groups.dp.size()), config.optimizer.lr)
        trained.losses.append(result.loss)
        trained.grad_norms.append(result.grad_norm)
        trained.source_losses += result.source_losses.values()
        if step == 0:
            for kind, decay in ((MOMENTS[0], config.optimizer.beta1), (MOMENTUM, config.optimizer.muon.momentum)):
                trained.gradients |= _slices(engine, kind, 1 / (1 - decay) / _clipped(config, result))
    trained.near_ties = sum(int((margin < NEAR_TIE).sum()) for found in margins for margin in found)
    trained.weights = _slices(engine, WEIGHT, 1.0)
    dist.barrier()
    return trained


def record_router_margins(router: TopKRouter) -> list[torch.Tensor]:
    """Record, at every forward pass, the margin between each token's last chosen and first not chosen expert: [tokens]."""
    found: list[torch.Tensor] = []

    def watched(logits: torch.Tensor) -> None:
        scores = logits.detach().float().flatten(0, -2)
        if router.score_function == "sigmoid":
            scores = scores.sigmoid() + (0 if router.expert_bias is None else router.expert_bias)
        if scores.shape[-1] > router.topk:
            best = scores.topk(router.topk + 1, dim=-1).values
            found.append(best[:, -2] - best[:, -1])

    watch_routing(router, watched)
    return found


def _clipped(config: Config, result: StepResult) -> float:
    """The factor of gradient clipping. Undoing it keeps a wrong norm from making every gradient look wrong."""
    limit = config.optimizer.clip_grad_norm
    return min(1.0, limit / (result.grad_norm + 1e-6)) if limit > 0 else 1.0


def _slices(engine: Engine, kind: str, factor: float) -> dict[SliceKey, NDArray[np.float32]]:
    """This rank's slices of one kind of tensors, in fp32, multiplied by `factor`."""
    return {
        (state_slice.name, state_slice.global_shape, state_slice.tensor_slice, state_slice.start, state_slice.stop): (
            state_slice.data.detach().float() * factor
        ).numpy()
        for state_slice in engine.owned_state()
        if state_slice.kind == kind
    }


def random_batches(config: Config, step: int, data_rank: int, data_size: int) -> list[MicroBatch]:
    """This data rank's micro-batches of a global batch that is the same for every layout."""
    generator = torch.Generator().manual_seed(1000 * config.run.seed + step)
    total, seq = config.batch.global_batch_seqs, config.batch.seq_length_tokens
    tokens = torch.randint(0, VOCAB_SIZE, (total, seq + 1), generator=generator)
    mask = (torch.rand(total, seq, generator=generator) > 0.2).float()
    if config.data.packing == "best_fit":
        # Every fourth sequence is half padding, one is padding but for two tokens.
        mask[::4, seq // 2 :] = 0.0
        mask[1:2, 2:] = 0.0
    ends = (torch.rand(total, seq, generator=generator) > 0.85).int().cumsum(dim=1).int()
    micro = config.batch.micro_batch_seqs
    sources = torch.arange(total) % max(len(source_paths(config.data)), 1)
    parts = [slice(first, first + micro) for first in range(data_rank * micro, total, data_size * micro)]
    return [
        MicroBatch(
            tokens=tokens[rows, :-1].contiguous(),
            labels=tokens[rows, 1:].contiguous(),
            loss_mask=mask[rows],
            position_ids=torch.arange(seq).expand(micro, seq),
            document_ids=ends[rows] if config.data.document_mask else None,
            parts=sources[rows],
        )
        for rows in parts
    ]
