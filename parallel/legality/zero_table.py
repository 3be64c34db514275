"""The table of engines, ZeRO stages and offload: which of them go with which feature of a run.

Rules read the table (parallel/legality/engine.py), the docs print it (`markdown`), and rehearsals test every legal cell. A
cell without an entry is legal without a remark. The verdicts come from runs that were compared with one process, in
tests/pretrain/engine/test_deepspeed.py. DeepSpeed's stages 2 and 3 run with a pipeline because of the guards in
parallel/compat/deepspeed/guards.py.

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
    """A feature of a run: the key that switches it on, and whether a config uses it."""

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
class ZeroTableEntry:
    """The verdict on a feature under some stages of an engine, its reason, and a legal change where it is refused."""

    engine: str
    stages: tuple[int, ...]
    feature: str
    verdict: str
    why: str
    fix: str = ""


_ALL = STAGES["deepspeed"]

ENTRIES: tuple[ZeroTableEntry, ...] = (
    ZeroTableEntry(
        "megatron", (0, 1), "optimizer offload", REFUSED,
        "the megatron engine keeps everything on the device; offload is deepspeed's",
        "set zero.offload=none, or zero.engine=deepspeed",
    ),
    ZeroTableEntry(
        "megatron", (0, 1), "parameter offload", REFUSED,
        "the megatron engine keeps everything on the device; offload is deepspeed's",
        "set zero.offload=none, or zero.engine=deepspeed with zero.stage=3",
    ),
    ZeroTableEntry(
        "megatron", (0, 1), "offload to nvme", REFUSED,
        "the megatron engine keeps everything on the device; offload is deepspeed's", "set zero.offload=none",
    ),
    ZeroTableEntry(
        "megatron", (0,), "overlapped gathering", REFUSED,
        "gathers weights that ZeRO sharded: zero.stage = 0", "set zero.stage=1, or overlap_param_gather=false",
    ),
    ZeroTableEntry(
        "deepspeed", (0,), "bf16 weights", REFUSED,
        "DeepSpeed keeps no fp32 main weights with fp32 gradients at stage 0",
        "set zero.stage=1, or zero.engine=megatron",
    ),
    ZeroTableEntry(
        "deepspeed", (0,), "optimizer offload", REFUSED,
        "only sharded optimizer state can live outside the device: zero.stage = 0", "set zero.stage=1, 2 or 3",
    ),
    ZeroTableEntry(
        "deepspeed", (0, 1, 2), "parameter offload", REFUSED,
        "keeps sharded weights outside the device, which needs zero.stage = 3", "set zero.stage=3, or zero.offload=optimizer",
    ),
    ZeroTableEntry(
        "deepspeed", (0, 1, 2), "offload to nvme", REFUSED,
        "DeepSpeed's stages below 3 keep the state in host memory, whatever device is named",
        "set zero.stage=3, or zero.offload_device=cpu",
    ),
    ZeroTableEntry(
        "deepspeed", _ALL, "overlapped reduction", REFUSED,
        "DeepSpeed's own stream is not held against one process under these schedules", "set zero.overlap_grad_reduce=false",
    ),
    ZeroTableEntry(
        "deepspeed", _ALL, "overlapped gathering", REFUSED,
        "is the megatron engine's; DeepSpeed's stage 3 fetches ahead by itself", "set zero.overlap_param_gather=false",
    ),
    ZeroTableEntry(
        "deepspeed", _ALL, "fp8", REFUSED,
        "fp8 weights and their scales are held by Transformer Engine with Megatron-Core's optimizer only",
        "set zero.engine=megatron, or precision.fp8=none",
    ),
    ZeroTableEntry(
        "deepspeed", (2,), "pipeline", COSTS,
        "stage 2 reduces the gradients of every micro-batch: as many times stage 1's traffic as a step has micro-batches",
    ),
    ZeroTableEntry(
        "deepspeed", (3,), "pipeline", COSTS,
        "stage 3 gathers the weights and reduces the gradients of every micro-batch, and can't learn the order to fetch ahead",
    ),
    ZeroTableEntry(
        "deepspeed", (1, 2, 3), "embedding on two stages", COSTS,
        "two stages hold the embedding, cut differently: both put its whole fp32 gradient together once a step",
    ),
    ZeroTableEntry(
        "deepspeed", (1, 2, 3), "optimizer offload", COSTS,
        "the update waits for the host: DeepSpeed's CPU Adam where ninja and a C++ compiler are found, else torch's",
    ),
    ZeroTableEntry(
        "deepspeed", (3,), "parameter offload", COSTS,
        "weights cross the host's bus for every micro-batch, forward and backward",
    ),
    ZeroTableEntry(
        "deepspeed", (3,), "offload to nvme", COSTS,
        "each update reads 12 and writes 12 bytes a parameter (weights offloaded too stay in host memory: DeepSpeed mixes up "
        "those it swaps when a step has several micro-batches); its async_io needs libaio and a C++ compiler",
    ),
)  # fmt: skip


def lookup(engine: str, stage: int, feature: str) -> ZeroTableEntry:
    """The table's cell."""
    for entry in ENTRIES:
        if entry.engine == engine and stage in entry.stages and entry.feature == feature:
            return entry
    return ZeroTableEntry(engine, (stage,), feature, LEGAL, "")


def applying(config: Config) -> Iterator[tuple[Feature, ZeroTableEntry]]:
    """The features that a config uses and their cells, without the cells that have no remark."""
    for name, feature in FEATURES.items():
        entry = lookup(config.zero.engine, config.zero.stage, name)
        if entry.verdict != LEGAL and feature.used(config):
            yield feature, entry


def rows() -> Iterator[tuple[str, dict[tuple[str, int], ZeroTableEntry]]]:
    """The whole table for the docs: feature, and its cell under each (engine, stage)."""
    columns = [(engine, stage) for engine, stages in STAGES.items() for stage in stages]
    for name in FEATURES:
        yield name, {column: lookup(*column, name) for column in columns}


def markdown() -> str:
    """The table as Markdown: a mark in each cell, the numbered reasons below."""
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
