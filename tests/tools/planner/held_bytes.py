"""Bytes that a rank of a small real run holds when its gradients are complete, by what they are for.

Run on a forked gloo rank: the real model and engine make two steps, and the second is stopped for a look where the engine
asks whether to apply it: all gradients are there, and so are the moments of the first step. Every live tensor is counted
once by its storage; what none of the names claims is `other`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from tests.pretrain.world import VOCAB, batches_of

# Larger than all else in a small run: the buffers in which DeepSpeed lets gradients travel.
BUCKET_BYTES = 50_000_000

Storages = dict[int, int]


def storages(tensors: Iterable[Any]) -> Storages:
    """Address → bytes of each storage behind the tensors."""
    found: Storages = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def alive() -> Storages:
    """Storages of every tensor that Python can reach, and of parameters' gradients."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return storages(tensors)


def nested(value: Any) -> Iterable[torch.Tensor]:
    """Tensors of dicts and lists of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from nested(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nested(item)


def weights_of(parameters: list[Any]) -> Iterable[torch.Tensor]:
    """What products read: whole parameters, or the parts that ZeRO-3 keeps and what it has gathered."""
    for parameter in parameters:
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def gradients_of(engine: Any, parameters: list[Any]) -> Iterable[torch.Tensor]:
    """Buffers that gradients are accumulated in, and those of single parameters."""
    for parameter in parameters:
        for name in ("grad", "main_grad", "grad_accum"):
            yield from nested(getattr(parameter, name, None))
    if engine.name == "megatron":
        for model in engine.models:
            for buffer in (*model.buffers, *model.expert_parallel_buffers):
                yield buffer.grad_data
    zero = getattr(getattr(engine, "runtime", None), "optimizer", None)
    for name in ("averaged_gradients", "grad_partitions_flat_buffer", "all_grad_tensors"):
        yield from nested(getattr(zero, name, None))


def optimizers_of(engine: Any) -> list[torch.optim.Optimizer]:
    if engine.name == "deepspeed":
        return [engine.adam]
    return [part.optimizer for part in engine.optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]


def names(engine: Any, parameters: list[Any]) -> dict[str, list[torch.Tensor]]:
    """What each tensor is for; a storage belongs to the first that names it. `host`: copies that offload keeps besides."""
    zero = getattr(getattr(engine, "runtime", None), "optimizer", None)
    flats = [getattr(zero, name, []) for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")]
    optimizers = optimizers_of(engine)
    mains = [*nested(flats), *nested([[group["params"] for group in optimizer.param_groups] for optimizer in optimizers])]
    moments = [*nested([list(optimizer.state.values()) for optimizer in optimizers])]
    if engine.muon is not None:
        moments += [engine.muon.momentum_of(slot) for slot in engine.muon.slots]
    host = [getattr(zero, name, None) for name in ("param_buffer_of_bit16_for_cpu_offload_groups", "lp_param_buffer")]
    staging = [getattr(zero, f"temp_grad_buffer_for_{place}_offload", None) for place in ("cpu", "gpu")]
    return {
        "staging": [*nested(staging)],
        "weights": [*weights_of(parameters)],
        "gradients": [*gradients_of(engine, parameters)],
        "host": [main.grad for main in mains if main.grad is not None] + [*nested(host)],
        "optimizer": [*moments, *mains],
    }


def held_bytes(config: Config) -> dict[str, int]:
    """weights, gradients, optimizer (main weights and moments), host, buckets, other: bytes of this rank; and its stage."""
    layout = make_layout(config)
    runtime = start({"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())})
    # What was there before the fork is not this run's, and looking through it takes seconds.
    gc.collect()
    gc.freeze()
    vocab = config.model.vocab_size
    assert vocab and vocab >= VOCAB, "the batches' tokens are below VOCAB"
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, vocab, config.parallel.pipeline_split)
    groups = make_groups(layout, config.run.seed)
    model = make_model(config, vocab, layout, chunks, groups, runtime.device)
    engine: Any = make_engine(config, model, groups, runtime.device)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    looks: list[dict[str, int]] = []

    def look(loss: float, grad_norm: float) -> bool:
        if engine.optimizer_steps() == 0:
            return True
        left = alive()
        found = {"largest_bucket": max(left.values())}
        found["buckets"] = sum(left.pop(address) for address in [*left] if left[address] >= BUCKET_BYTES)
        for name, tensors in names(engine, parameters).items():
            found[name] = sum(left.pop(address, 0) for address in storages(tensors))
        # Two buffers of the largest parameter, which on the CPU is all experts of a layer in one: not so on GPUs.
        found.pop("staging")
        found["other"] = sum(left.values())
        looks.append(found)
        return True

    for step in range(2):
        engine.step(batches_of(config, step, groups.dp.rank(), groups.dp.size()), 3e-3, look)
    (found,) = looks
    return {"stage": groups.pp.rank(), **found}
