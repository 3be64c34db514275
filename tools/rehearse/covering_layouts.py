"""`--layouts auto`: few layouts that cover every legal pair (or triple) of axis values.

In: the config. Out: configs, chosen greedily and always in the same order. The verdict decides what is legal.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import combinations, product
from typing import Any

from configs.schema import Config, Zero
from parallel.legality.verdict import check_config
from tools.rehearse.shrink import QK_CLIP, common_divisors, shrink

Values = tuple[tuple[str, Any], ...]

_AXES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2),
    "context": (1, 2),
    "pipeline": (1, 2),
    "virtual_pipeline": (None, 2),
    "expert": (1, 2),
    "expert_tensor": (1, 2),
    "data": (1, 2),
    "zero": (("megatron", 0), ("megatron", 1), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)),
    "offload": ("none", "optimizer", "param"),
    "overlap": (False, True),
}
# Axes with optimizer.kind = muon. QK-clip drops out where it is refused.
_MUON_AXES: dict[str, tuple[Any, ...]] = {"split_heads": ("none", "qkv", "head"), "qk_clip": (None, QK_CLIP)}
# Sequences of a micro-batch that layouts are rehearsed with.
MICRO_BATCHES = (1, 2)


def apply(config: Config, values: Values) -> Config:
    """The config with these axis values, on as many ranks as they need."""
    chosen = dict(values)
    config = deepcopy(config)
    parallel = config.parallel
    for axis in ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor"):
        setattr(parallel, axis, chosen[axis])
    parallel.sequence, parallel.pipeline_split, parallel.overlap_expert_comm = None, None, chosen["overlap"]
    (engine, stage), offload = chosen["zero"], chosen["offload"]
    config.zero = Zero(engine=engine, stage=stage, offload=offload)
    config.launch.nodes = 1
    config.launch.processes_per_node = parallel.tensor * parallel.context * parallel.pipeline * chosen["data"]
    return config


def legal_layouts(
    config: Config, max_ranks: int, micro_batches: Sequence[int] = MICRO_BATCHES
) -> Iterator[tuple[Values, Config]]:
    """(axis values, config) of every legal layout of at most `max_ranks` ranks with each micro-batch, in sequences."""
    variants = list(muon_variants(config))
    for values in product(*_AXES.values()):
        named = tuple(zip(_AXES, values, strict=True))
        candidate = apply(config, named)
        candidate.batch.micro_batch_seqs = max(micro_batches)
        if candidate.launch.processes_per_node > max_ranks or not _is_legal(candidate):
            continue
        # Whether a layout is legal depends neither on the micro-batch, which the global batch of a rehearsal fits, nor on Muon.
        for micro_batch_seqs, muon in product(micro_batches, variants):
            made = deepcopy(candidate)
            made.batch.micro_batch_seqs = micro_batch_seqs
            for axis, value in muon:
                setattr(made.optimizer.muon, axis, value)
            yield (*named, ("micro_batch", micro_batch_seqs), *muon), made


def muon_variants(config: Config) -> Iterator[Values]:
    """The legal values of the axes of Muon; one empty variant with another optimizer."""
    if config.optimizer.kind != "muon":
        yield ()
        return
    for values in product(*_MUON_AXES.values()):
        named = tuple(zip(_MUON_AXES, values, strict=True))
        made = deepcopy(config)
        for axis, value in named:
            setattr(made.optimizer.muon, axis, value)
        if not any(problem.path.startswith("optimizer.") for problem in check_config(made).problems):
            yield named


def _is_legal(config: Config) -> bool:
    parallel = config.parallel
    world = config.launch.processes_per_node
    if world % (parallel.expert_tensor * parallel.expert * parallel.pipeline):
        return False
    return check_config(shrink(config, common_divisors([config]))).ok


def covering_subset(candidates: Sequence[tuple[Values, Config]], strength: int) -> list[tuple[Values, Config]]:
    """A few candidates that cover every combination of `strength` values that occurs in any candidate. Chosen greedily."""
    groups = [set(combinations(values, strength)) for values, _ in candidates]
    wanted = set().union(*groups)
    chosen = []
    while wanted:
        best = max(range(len(candidates)), key=lambda index: len(wanted & groups[index]))
        wanted -= groups[best]
        chosen.append(candidates[best])
    return chosen
