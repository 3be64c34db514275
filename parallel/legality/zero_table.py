"""Which engine, stage and offload go with which feature of a run: one table, as data.

Rules read it (parallel/legality/engine.py), the docs print it (`rows`), rehearsals hold every cell called legal. A cell that
no entry names is legal without a remark. What decides is what was run against one process, in
tests/pretrain/engine/test_deepspeed.py. With the guards of parallel/compat/deepspeed/guards.py, DeepSpeed's stages 2 and 3 run
with a pipeline.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from configs.schema import Config

LEGAL, COSTS, REFUSED = "legal", "legal, with a cost", "refused"
STAGES = {"megatron": (0, 1), "deepspeed": (0, 1, 2, 3)}


@dataclass(frozen=True)
class Feature:
    """Something a run may use: the key that says so, and how to know."""

    path: str
    used: Callable[[Config], bool]


FEATURES: dict[str, Feature] = {
    "tensor": Feature("parallel.tensor", lambda c: c.parallel.tensor > 1),
    "pipeline": Feature("parallel.pipeline", lambda c: c.parallel.pipeline > 1),
    "virtual pipeline": Feature("parallel.virtual_pipeline", lambda c: (c.parallel.virtual_pipeline or 1) > 1),
    "context": Feature("parallel.context", lambda c: c.parallel.context > 1),
    "expert": Feature("parallel.expert", lambda c: c.parallel.expert > 1),
    "expert tensor": Feature("parallel.expert_tensor", lambda c: c.parallel.expert_tensor > 1),
    "embedding on two stages": Feature(
        "parallel.pipeline", lambda c: c.parallel.pipeline > 1 and (c.model.tie_embeddings or c.model.mtp.num_layers > 0)
    ),
    "multi-token prediction": Feature("model.mtp.num_layers", lambda c: c.model.mtp.num_layers > 0),
    "latent attention": Feature("model.mla.kv_lora_rank", lambda c: c.model.mla.kv_lora_rank is not None),
    "bf16 weights": Feature("precision.params", lambda c: c.precision.params == "bf16"),
    "bf16 gradients": Feature("precision.grads", lambda c: c.precision.grads == "bf16"),
    "fp8": Feature("precision.fp8", lambda c: c.precision.fp8 != "none"),
    "full recompute": Feature("recompute.mode", lambda c: c.recompute.mode == "full"),
    "optimizer offload": Feature("zero.offload", lambda c: c.zero.offload == "optimizer"),
    "parameter offload": Feature("zero.offload", lambda c: c.zero.offload == "param"),
    "offload to nvme": Feature("zero.offload_device", lambda c: c.zero.offload != "none" and c.zero.offload_device == "nvme"),
    "overlapped reduction": Feature("zero.overlap_grad_reduce", lambda c: c.zero.overlap_grad_reduce),
    "overlapped gathering": Feature("zero.overlap_param_gather", lambda c: c.zero.overlap_param_gather),
}


@dataclass(frozen=True)
class Entry:
    """What is said of a feature under an engine's stages, and the nearest choice that is legal where it is refused."""

    engine: str
    stages: tuple[int, ...]
    feature: str
    verdict: str
    why: str
    fix: str = ""


_ALL = STAGES["deepspeed"]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "megatron", (0, 1), "optimizer offload", REFUSED,
        "the megatron engine keeps everything on the device; offload is deepspeed's",
        "set zero.offload=none, or zero.engine=deepspeed",
    ),
    Entry(
        "megatron", (0, 1), "parameter offload", REFUSED,
        "the megatron engine keeps everything on the device; offload is deepspeed's",
        "set zero.offload=none, or zero.engine=deepspeed with zero.stage=3",
    ),
    Entry(
        "megatron", (0, 1), "offload to nvme", REFUSED,
        "the megatron engine keeps everything on the device; offload is deepspeed's", "set zero.offload=none",
    ),
    Entry(
        "megatron", (0,), "overlapped gathering", REFUSED,
        "gathers weights that ZeRO sharded: zero.stage = 0", "set zero.stage=1, or overlap_param_gather=false",
    ),
    Entry(
        "deepspeed", (0,), "bf16 weights", REFUSED,
        "DeepSpeed keeps no fp32 main weights with fp32 gradients at stage 0",
        "set zero.stage=1, or zero.engine=megatron",
    ),
    Entry(
        "deepspeed", (0,), "optimizer offload", REFUSED,
        "only sharded optimizer state can live outside the device: zero.stage = 0", "set zero.stage=1, 2 or 3",
    ),
    Entry(
        "deepspeed", (0, 1, 2), "parameter offload", REFUSED,
        "keeps sharded weights outside the device, which needs zero.stage = 3", "set zero.stage=3, or zero.offload=optimizer",
    ),
    Entry(
        "deepspeed", (0, 1, 2), "offload to nvme", REFUSED,
        "DeepSpeed's stages below 3 keep the state in host memory, whatever device is named",
        "set zero.stage=3, or zero.offload_device=cpu",
    ),
    Entry(
        "deepspeed", _ALL, "overlapped reduction", REFUSED,
        "DeepSpeed's own stream is not held against one process under these schedules", "set zero.overlap_grad_reduce=false",
    ),
    Entry(
        "deepspeed", _ALL, "overlapped gathering", REFUSED,
        "is the megatron engine's; DeepSpeed's stage 3 fetches ahead by itself", "set zero.overlap_param_gather=false",
    ),
    Entry(
        "deepspeed", _ALL, "fp8", REFUSED,
        "fp8 weights and their scales are held by Transformer Engine with Megatron-Core's optimizer only",
        "set zero.engine=megatron, or precision.fp8=none",
    ),
    Entry(
        "deepspeed", (2,), "pipeline", COSTS,
        "stage 2 reduces the gradients of every micro-batch: as many times stage 1's traffic as a step has micro-batches",
    ),
    Entry(
        "deepspeed", (3,), "pipeline", COSTS,
        "stage 3 gathers the weights and reduces the gradients of every micro-batch, and can't learn the order to fetch ahead",
    ),
    Entry(
        "deepspeed", (1, 2, 3), "embedding on two stages", COSTS,
        "two stages hold the embedding, cut differently: both put its whole fp32 gradient together once a step",
    ),
    Entry(
        "deepspeed", (1, 2, 3), "optimizer offload", COSTS,
        "the update waits for the host: DeepSpeed's CPU Adam where ninja and a C++ compiler are found, else torch's",
    ),
    Entry(
        "deepspeed", (3,), "parameter offload", COSTS,
        "weights cross the host's bus for every micro-batch, forward and backward",
    ),
    Entry(
        "deepspeed", (3,), "offload to nvme", COSTS,
        "each update reads 12 and writes 12 bytes a parameter (weights offloaded too stay in host memory: DeepSpeed mixes up "
        "those it swaps when a step has several micro-batches); its async_io needs libaio and a C++ compiler",
    ),
)  # fmt: skip


def lookup(engine: str, stage: int, feature: str) -> Entry:
    """The table's cell."""
    for entry in ENTRIES:
        if entry.engine == engine and stage in entry.stages and entry.feature == feature:
            return entry
    return Entry(engine, (stage,), feature, LEGAL, "")


def applying(config: Config) -> Iterator[tuple[Feature, Entry]]:
    """The cells of the features that a config uses, those without a remark left out."""
    for name, feature in FEATURES.items():
        entry = lookup(config.zero.engine, config.zero.stage, name)
        if entry.verdict != LEGAL and feature.used(config):
            yield feature, entry


def rows() -> Iterator[tuple[str, dict[tuple[str, int], Entry]]]:
    """The whole table for the docs: feature, and its cell under each (engine, stage)."""
    columns = [(engine, stage) for engine, stages in STAGES.items() for stage in stages]
    for name in FEATURES:
        yield name, {column: lookup(*column, name) for column in columns}


def markdown() -> str:
    """The table as the README shows it: a mark a cell, the reasons below."""
    columns = [(engine, stage) for engine, stages in STAGES.items() for stage in stages]
    reasons: list[str] = []
    lines = ["| | " + " | ".join(f"{engine} {stage}" for engine, stage in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows():
        marks = []
        for column in columns:
            entry = cells[column]
            if entry.why and entry.why not in reasons:
                reasons.append(entry.why)
            number = f" ({reasons.index(entry.why) + 1})" if entry.why else ""
            marks.append({LEGAL: "yes", COSTS: "cost", REFUSED: "no"}[entry.verdict] + number)
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    notes = [f"{number}. {why}" for number, why in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes])
