"""A small model trained for a few steps on any layout: what the parity tests run on forked ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.load import to_yaml
from configs.schema import BlendPart, Config
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from pretrain.data.batches import MicroBatch
from pretrain.engine.base import Engine
from pretrain.main import main
from pretrain.metrics.moe_metrics import MoeMetrics
from pretrain.rank.stop_signals import StopSignals

VOCAB = 300
NUM_SOURCES = 3


def small_config(**changes: Any) -> Config:
    """4 layers whose widths all differ; `changes` are dotted keys with __ for the dots."""
    config = Config()
    model = config.model
    model.num_layers, model.hidden_size, model.vocab_size, model.ffn_hidden_size = 4, 32, VOCAB, 56
    model.attention.num_heads, model.attention.num_query_groups, model.attention.head_dim = 4, 2, 12
    model.attention.qk_norm = True
    model.moe.num_experts, model.moe.top_k, model.moe.ffn_hidden_size = 8, 2, 24
    model.moe.router.aux_loss_coeff = 0.02
    # Large weights: a wrong gradient then shows in the loss too.
    model.init_std = 0.1
    config.precision.params = "fp32"
    config.batch.global_batch_seqs, config.batch.micro_batch_seqs, config.batch.seq_length_tokens = 4, 1, 16
    config.run.steps = 3
    # Adam turns the rounding noise of a vanishing gradient, another on every CPU, into whole steps unless epsilon is above it.
    config.optimizer.eps = 1e-6
    for name, value in changes.items():
        *sections, key = name.split("__")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        assert hasattr(section, key), f"no key {name}"
        setattr(section, key, value)
    return config


def write_config(path: Path, corpus: Path, steps: int, **changes: Any) -> Path:
    """Write a config over the shared corpus (tests/conftest.py): `steps` steps of 8 sequences of 32 tokens. Returns `path`."""
    made = small_config(model__vocab_size=None, schedule__warmup_steps=1, **changes)
    made.data.tokenizer.path = str(corpus / "tok.model")
    made.data.train = [BlendPart(str(corpus / "embedded"))]
    made.batch.global_batch_seqs, made.batch.seq_length_tokens = 8, 32
    made.run.steps, made.metrics.sinks = steps, ["jsonl"]
    path.write_text(to_yaml(made))
    return path


def exit_code(words: list[str], signals: StopSignals | None = None) -> int:
    """A rank's whole program on a forked rank: the exit code of pretrain/main.py."""
    try:
        return main(words, signals or StopSignals())
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


def spoiling(read: Callable[..., list[MicroBatch]], bad: tuple[int, ...]) -> Callable[..., list[MicroBatch]]:
    """`micro_batches` that makes the loss of the samples `bad` no finite number."""

    def spoiled(stream: Any, first: int, size: int, *args: Any) -> list[MicroBatch]:
        found = read(stream, first, size, *args)
        if any(first <= number < first + size for number in bad):
            found[0].loss_mask[0, 0] = 3e38
        return found

    return spoiled


@dataclass
class Trained:
    """What a rank saw: per step (loss, grad norm, tokens, router metrics) and tokens of each expert; validation loss, and whether
    validating left the random state alone; its slices of weights, gradients.
    """

    steps: list[tuple[float, float, int, dict[str, float]]] = field(default_factory=list)
    expert_counts: list[list[list[int]]] = field(default_factory=list)
    valid: float = 0.0
    validates_quietly: bool = True
    weights: dict[Any, np.ndarray] = field(default_factory=dict)
    gradients: dict[Any, np.ndarray] = field(default_factory=dict)


def batches_of(config: Config, step: int, data_rank: int, data_size: int) -> list[MicroBatch]:
    """Random tokens with random loss masks, the same global batch for every layout."""
    generator = torch.Generator().manual_seed(100 + step)
    total, seq, micro = config.batch.global_batch_seqs, config.batch.seq_length_tokens, config.batch.micro_batch_seqs
    tokens = torch.randint(0, VOCAB, (total, seq + 1), generator=generator)
    parts = torch.arange(total) % NUM_SOURCES
    mask = (torch.rand(total, seq, generator=generator) > 0.2).float()
    ends = (torch.rand(total, seq, generator=generator) > 0.85).int()
    documents = torch.cumsum(ends, dim=1) if config.data.document_mask else None
    found = []
    for number in range(data_rank, total // micro, data_size):
        rows = slice(number * micro, (number + 1) * micro)
        found.append(
            MicroBatch(
                tokens=tokens[rows, :-1].contiguous(),
                labels=tokens[rows, 1:].contiguous(),
                loss_mask=mask[rows],
                position_ids=torch.arange(seq).expand(micro, seq),
                document_ids=None if documents is None else documents[rows].int(),
                parts=parts[rows],
            )
        )
    return found


def train_small(config: Config, keep_gradients: bool = False) -> Trained:
    """Runs on a forked rank: the real model, engine and schedules; no files."""
    config.data.train = [BlendPart(f"source_{number}") for number in range(NUM_SOURCES)]
    layout = make_layout(config)
    runtime = start({"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())})
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, VOCAB, config.parallel.pipeline_split)
    groups = make_groups(layout, config.run.seed)
    model = make_model(config, VOCAB, layout, chunks, groups, runtime.device)
    engine = make_engine(config, model, groups, runtime.device)
    moe = MoeMetrics(model, config.model, groups)
    result = Trained()
    for step in range(config.run.steps or 1):
        batches = batches_of(config, step, groups.dp.rank(), groups.dp.size())
        done = engine.step(batches, 3e-3)
        result.steps.append((done.loss, done.grad_norm, done.num_tokens, moe.take(len(batches), 2) | done.source_losses))
        valid = torch.zeros(NUM_SOURCES, dtype=torch.float64)
        for batch in batches_of(config, step, 0, 1):
            assert batch.parts is not None
            valid.index_add_(0, batch.parts, batch.loss_mask.double().sum(dim=1))
        summed = sum(float(valid[int(name[-1])]) * loss for name, loss in done.source_losses.items())
        assert len(done.source_losses) == NUM_SOURCES and abs(summed / done.num_tokens - done.loss) < 1e-6 * done.loss
        result.expert_counts.append(moe.expert_counts(config.batch.global_batch_seqs * config.batch.seq_length_tokens))
        if keep_gradients and step == 0:
            result.gradients = _gradients(engine)
    random_state = torch.get_rng_state()
    loss_sum, tokens = engine.evaluate(batches_of(config, 99, groups.dp.rank(), groups.dp.size()))
    result.valid, result.validates_quietly = loss_sum / tokens, torch.equal(random_state, torch.get_rng_state())
    result.weights = owned_values(engine)
    return result


def owned_values(engine: Engine) -> dict[Any, np.ndarray]:
    """A copy of every state slice that the engine owns on this rank, by its kind, tensor and place."""
    return {
        (one.kind, one.name, one.global_shape, one.tensor_slice, one.start, one.stop): one.data.detach().clone().numpy()
        for one in engine.owned_state()
    }


def _gradients(engine: Any) -> dict[Any, np.ndarray]:
    """Every reduced gradient that this rank holds whole (ZeRO 0), by slice."""
    found = {}
    for shards, tensors in zip(engine.shards, engine.tensors, strict=True):
        for name, tensor in tensors.items():
            if not hasattr(tensor, "main_grad"):
                continue
            flat = tensor.main_grad.detach().float().flatten()
            for position, slice_, first, stop in shards[name].slice_ranges(0, flat.numel()):
                key = ("grad", shards[name].name, shards[name].global_shape, slice_, first, stop)
                found[key] = flat[position : position + stop - first].clone().numpy()
    return found


def assemble(slices: list[dict[Any, np.ndarray]]) -> dict[tuple[str, str], np.ndarray]:
    """The whole tensors of all ranks' slices; asserts that every element is there."""
    whole: dict[tuple[str, str], np.ndarray] = {}
    for part in slices:
        for (kind, name, shape, slice_, first, stop), values in part.items():
            target = whole.setdefault((kind, name), np.full(shape, np.nan, dtype=values.dtype))
            index = slice_.slices_of(type(slice_)((0,) * len(shape), shape))
            view = target[index].flatten()
            view[first:stop] = values
            target[index] = view.reshape(slice_.shape)
    for key, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"part of {key} is on no rank"
    return whole


def largest_difference(got: dict[Any, np.ndarray], want: dict[Any, np.ndarray], floor: float = 1e-7) -> tuple[float, Any]:
    """max over tensors of |got - want| / |want| (2-norms, floor against vanishing tensors), and where."""
    assert got.keys() == want.keys(), f"other tensors: {got.keys() ^ want.keys()}"
    found = [(float(np.linalg.norm(got[k] - want[k]) / max(np.linalg.norm(want[k]), floor)), k) for k in want]
    return max(found, key=lambda item: item[0])
