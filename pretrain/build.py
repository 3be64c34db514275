"""Building the parts of a run: model, engine, data, and the `TrainingRun` that the loop trains."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from configs.schema import Config
from parallel.compat.expert_capacity import measure_before_dropping
from parallel.compat.megatron_guards import mark_expert_parameters
from parallel.compat.prediction_losses import sum_prediction_losses
from parallel.compat.router_losses import weigh_router_losses
from parallel.layout import Layout
from parallel.stages import Chunk
from pretrain.checkpoint.saving import Common, Saver
from pretrain.data.streams import build_streams
from pretrain.divergence_guard import DivergenceGuard
from pretrain.engine.base import Engine
from pretrain.engine.megatron import MegatronEngine
from pretrain.loop import RankPlace, StepMeasures, TrainingRun
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
from pretrain.records import Records
from pretrain.resume import Restored
from pretrain.run.journal import say
from pretrain.session import RunContext, Session
from pretrain.training_data import TrainingData


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
    measure_before_dropping(model)
    sum_prediction_losses()
    return model


def make_engine(config: Config, model: list[PaddedVocabGPT], groups: ProcessGroupCollection, device: torch.device) -> Engine:
    """The engine that the config names."""
    if config.zero.engine == "megatron":
        return MegatronEngine(config, model, groups, device)
    return import_deepspeed(device.type).DeepSpeedZero(config, model, groups, device)


def import_deepspeed(device_type: str) -> ModuleType:
    """The module of our DeepSpeed engine. It is imported only when it is needed: the import takes 3 s."""
    # Without it DeepSpeed guesses the accelerator, and warns on stdout.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    return importlib.import_module("pretrain.engine.deepspeed")


def make_training_data(context: RunContext, groups: ProcessGroupCollection, restored: Restored) -> TrainingData:
    """Open the data and begin to read at the restored position. Collective: rank 0 writes the order files of large data."""

    def barrier() -> None:
        dist.barrier()

    config = context.config
    streams = build_streams(config, context.tokenizer, is_builder=context.runtime.rank == 0, barrier=barrier, say=say)
    return TrainingData(config, groups, streams, restored.position, context.stop_step)


def make_training_run(
    session: Session,
    layout: Layout,
    groups: ProcessGroupCollection,
    model: list[PaddedVocabGPT],
    engine: Engine,
    restored: Restored,
    data: TrainingData,
    records: Records,
    signals: StopSignals,
) -> TrainingRun:
    """Everything that the loop needs, around the restored engine. Collective."""
    context = session.context
    config, device = context.config, context.runtime.device
    measures = StepMeasures(
        MoeMetrics(model, config.model, groups),
        make_meter(config, layout, context.vocab_size),
        ProfileWindow(config.metrics.profile, context.folder.profile, context.runtime.rank),
        SpeedProbe(config.launch.watch.probe_interval_steps, device, signals.beat),
    )
    return TrainingRun(
        config=config,
        place=RankPlace(device, groups.pp.rank(), layout.pipeline),
        engine=engine,
        data=data,
        measures=measures,
        records=records,
        saver=make_saver(session, restored, records, engine, layout),
        guard=DivergenceGuard(session, engine, restored, records),
        signals=signals,
        position=restored.position,
        stop_step=context.stop_step,
        horizon_steps=restored.horizon_steps,
    )


def make_saver(session: Session, restored: Restored, records: Records, engine: Engine, layout: Layout) -> Saver:
    """Saves of this attempt; a checkpoint is written only after the record's rows are on the disk."""
    context, journal = session.context, session.journal
    data = session.rank_zero.data_identity if session.rank_zero is not None else None
    common = Common(context.config, context.identity, context.vocab_size, data, restored.horizon_steps, layout)
    saver = Saver(
        context.folder.checkpoints,
        engine,
        common,
        context.runtime,
        records.sync_before_save,
        journal.write_event,
        journal.tell,
        session.after_save.saved,
    )
    if restored.checkpoint_step is not None:
        saver.last_step = restored.checkpoint_step
    return saver
