"""CPU time of a Phalanx step, compared with a bare Megatron-Core loop on the same model, in one run.

phalanx bench step [--steps N]

Two processes, pipeline 2, train the quickstart's model on random tokens. The bare loop has Megatron-Core's DDP, distributed
optimizer and schedule, and a loss function. The Phalanx step has the engine, router metrics, the metrics row, the all-reduce
on which ranks agree, and the record. The two alternate step by step, so that other load on the machine affects both alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from configs.load import load_config
from configs.schema import Config
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from pretrain.checkpoint.restore import TrainingPosition
from pretrain.data.batches import MicroBatch
from pretrain.metrics.meter import make_meter
from pretrain.metrics.moe_metrics import MoeMetrics
from pretrain.run.record import Record

VOCAB = 2048
OVERRIDES = ("parallel.expert=1", "launch.processes_per_node=2", f"model.vocab_size={VOCAB}")


def random_batches(config: Config, step: int) -> list[MicroBatch]:
    """The micro-batches of one step: random tokens, the same for both sides."""
    batch = config.batch
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (batch.global_batch_seqs, batch.seq_length_tokens + 1), generator=generator)
    positions = torch.arange(batch.seq_length_tokens).expand(batch.micro_batch_seqs, -1)
    mask = torch.ones(batch.micro_batch_seqs, batch.seq_length_tokens)
    parts = tokens.split(batch.micro_batch_seqs)
    return [MicroBatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), mask, positions, None) for t in parts]


def bare_step(config: Config, model: Any, groups: Any) -> Callable[[list[MicroBatch]], None]:
    """A step of Megatron-Core alone, with the settings that the engine gives it."""
    transformer = model[0].config
    transformer.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(transformer, ddp, chunk, pg_collection=groups) for chunk in model]
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, wrapped, use_gloo_process_groups=False)  # type: ignore[arg-type]
    run = get_forward_backward_func()

    def forward(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = (output.float() * batch.loss_mask).sum()
            return total, batch.loss_mask.sum().int(), total.detach().clone()

        return chunk(batch.tokens, batch.position_ids, None, labels=batch.labels), loss

    def step(batches: list[MicroBatch]) -> None:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=list[torch.nn.Module](wrapped),
            num_microbatches=len(batches),
            seq_length=config.batch.seq_length_tokens,
            micro_batch_size=config.batch.micro_batch_seqs,
            forward_only=False,
        )
        optimizer.step()

    return step


def our_step(config: Config, model: Any, groups: Any, device: torch.device, folder: str) -> Callable[[list[MicroBatch]], None]:
    """A step of the engine, and what the training loop does around it."""
    layout = make_layout(config)
    engine = make_engine(config, model, groups, device)
    moe = MoeMetrics(model, config.model, groups)
    meter = make_meter(config, layout, VOCAB)
    record = Record.open(Path(folder) / f"metrics_{dist.get_rank()}.jsonl", 0, lambda *args, **fields: None)
    steps = 0

    def step(batches: list[MicroBatch]) -> None:
        nonlocal steps
        started_s = time.perf_counter()
        result = engine.step(batches, 1e-3)
        steps += 1
        row = meter.row(TrainingPosition(steps, steps, steps), result, 1e-3, result.num_tokens, time.perf_counter() - started_s)
        row |= moe.take(len(batches), config.metrics.expert_load_layers)
        flags = torch.zeros(4, dtype=torch.float64)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        record.append(row)

    return step


def rank_main(rank: int, world: int, folder: str, steps: int) -> None:
    """One of the two ranks: alternate the two kinds of steps, and write CPU seconds per step to times_RANK.json."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    store = dist.FileStore(f"{folder}/store", world)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    config = load_config("quickstart", OVERRIDES).config
    layout = make_layout(config)
    device = start(os.environ).device
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, VOCAB, None)
    groups = make_groups(layout, config.run.seed)
    ways = {
        "bare": bare_step(config, make_model(config, VOCAB, layout, chunks, groups, device), groups),
        "ours": our_step(config, make_model(config, VOCAB, layout, chunks, groups, device), groups, device, folder),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps + 3):
        for name, run in ways.items():
            batches = random_batches(config, step)
            dist.barrier()
            before = time.process_time()
            run(batches)
            if step >= 3:
                times[name].append(time.process_time() - before)
    Path(folder, f"times_{rank}.json").write_text(json.dumps(times))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="phalanx bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(argv).steps
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=rank_main, args=(rank, 2, folder, steps)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        times = [json.loads(Path(folder, f"times_{rank}.json").read_text()) for rank in range(2)]
    print(f"{'CPU s a step, both ranks':<28}{'median':>8}{'lowest':>8}")
    for name in ("bare", "ours"):
        both = [a + b for a, b in zip(times[0][name], times[1][name], strict=True)]
        print(f"{name:<28}{statistics.median(both):8.3f}{min(both):8.3f}")
    ratios = [(times[0]["ours"][i] + times[1]["ours"][i]) / (times[0]["bare"][i] + times[1]["bare"][i]) for i in range(steps)]
    print(f"{'ours / bare, median of steps':<28}{statistics.median(ratios):8.3f}")
