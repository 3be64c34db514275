"""Putting the parts of a run together: model, engine, data and what the loop needs of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from configs.schema import Config
from parallel.compat.megatron_guards import mark_expert_parameters
from parallel.compat.router_losses import weigh_router_losses
from parallel.layout import Layout
from parallel.stages import Chunk
from pretrain.checkpoint.restore import Position
from pretrain.data.batches import MicroBatch, Prefetcher, micro_batches
from pretrain.data.streams import SampleStream, build_streams
from pretrain.engine.base import Engine
from pretrain.engine.megatron import MegatronEngine
from pretrain.loop import GlobalBatch, Run, batch_positions
from pretrain.metrics.meter import make_meter
from pretrain.metrics.moe_metrics import MoeMetrics
from pretrain.model.backend import choose_backend, detect_machine
from pretrain.model.gpt import PaddedVocabGPT, build_chunks
from pretrain.model.init import fill
from pretrain.model.megatron_config import make_transformer_config
from pretrain.model.shards import local_tensors, map_shards
from pretrain.rank.profiling import ProfileWindow
from pretrain.rank.speed_probe import SpeedProbe
from pretrain.rank.stop_signals import StopSignals
from pretrain.session import Session


def make_model(
    config: Config,
    vocab_size: int,
    layout: Layout,
    chunks: tuple[Chunk, ...],
    groups: ProcessGroupCollection,
    device: torch.device,
) -> list[PaddedVocabGPT]:
    """This rank's chunks with their initial weights, on the device."""
    backend = choose_backend(config, detect_machine(device.type == "cuda"))
    transformer = make_transformer_config(config, layout, chunks, backend)
    model = build_chunks(config, vocab_size, transformer, layout, chunks, groups, backend)
    for chunk in model:
        chunk.to(device)
        shards = map_shards(chunk, groups)
        for name, tensor in local_tensors(chunk):
            fill(tensor, shards[name], config.model, config.run.seed)
    mark_expert_parameters(model, groups)
    weigh_router_losses(model)
    return model


def make_engine(config: Config, model: list[PaddedVocabGPT], groups: ProcessGroupCollection, device: torch.device) -> Engine:
    """The engine that the config names."""
    if config.zero.engine == "megatron":
        return MegatronEngine(config, model, groups, device)
    return import_deepspeed(device.type).DeepSpeedZero(config, model, groups, device)


def import_deepspeed(device_type: str) -> ModuleType:
    """Our engine on DeepSpeed: 3 s of imports, for which the other engine's ranks need not wait."""
    # Else it guesses, and warns on stdout.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    return importlib.import_module("pretrain.engine.deepspeed")


def make_run(
    session: Session,
    layout: Layout,
    groups: ProcessGroupCollection,
    model: list[PaddedVocabGPT],
    engine: Engine,
    position: Position,
    signals: StopSignals,
) -> Run:
    """Data, metrics and saver around the engine."""
    config, runtime = session.config, session.runtime

    def barrier() -> None:
        dist.barrier()

    def read(position: Position) -> Prefetcher[GlobalBatch]:
        return Prefetcher(reader.training(streams.train, position, stop_step))

    streams = build_streams(config, session.tokenizer, is_builder=runtime.rank == 0, barrier=barrier)
    reader = BatchReader(config, groups)
    stop_step = session.stop_step
    return Run(
        config=config,
        layout=layout,
        device=runtime.device,
        stage=groups.pp.rank(),
        engine=engine,
        read=read,
        batches=read(position),
        validation=reader.validation(streams.valid) if streams.valid else [],
        moe=MoeMetrics(model, config.model, groups),
        meter=make_meter(config, layout, session.vocab_size),
        profile=ProfileWindow(config.metrics.profile, session.folder.path / "profile", runtime.rank),
        saver=session.make_saver(engine, layout),
        sink=session.open_sinks(),
        policy=session.make_policy(),
        roll_back=partial(session.roll_back, engine),
        say=session.say,
        stop=signals,
        beat=signals.beat,
        probe=SpeedProbe(config.launch.watch.probe_interval_steps, runtime.device, signals.beat),
        position=position,
        stop_step=stop_step,
        horizon_steps=session.horizon_steps,
    )


class BatchReader:
    """Reads this rank's micro-batches. Every stage reads: the first needs tokens, the last labels, all the documents."""

    def __init__(self, config: Config, groups: ProcessGroupCollection) -> None:
        self.config = config
        self.data_rank, self.data_size = groups.dp.rank(), groups.dp.size()

    def training(self, stream: SampleStream, start: Position, stop_step: int) -> Iterator[GlobalBatch]:
        """(sequences, micro-batches) of each step from `start` on."""
        for first, size in batch_positions(self.config, start, stop_step):
            yield size, self._read(stream, first, size)

    def validation(self, stream: SampleStream) -> list[list[MicroBatch]]:
        """The same held-out global batches at every validation; read once."""
        size = self.config.batch.global_batch_seqs
        return [self._read(stream, number * size, size) for number in range(self.config.run.eval_batches)]

    def _read(self, stream: SampleStream, first: int, size: int) -> list[MicroBatch]:
        return micro_batches(stream, first, size, self.config.batch.micro_batch_seqs, self.data_rank, self.data_size)
