"""Published runs as jobs with measurements: which rows count, and which do not.

In: rows (see data/README.md). Out: `PublishedRun`s that can be compared, and for the others the reason, counted.

Torch-free.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallel.memory.job import PlannedJob
from tools.planner.published.model import UnusableRow
from tools.planner.published.parse_words import with_typed_values
from tools.planner.published.row import RECOMPUTE_ASSUMED, TEXTS, is_malformed, job_of, memory_of, speed_of

# Who published, by words of a row's source.
SOURCES = (
    ("tests/functional_tests", "Megatron-LM CI"),
    ("Megatron-Bridge docs/performance-summary", "Megatron-Bridge performance summary"),
    ("Megatron-Bridge skills", "Megatron-Bridge skills"),
    ("dgxc-benchmarking", "NVIDIA/dgxc-benchmarking"),
    ("pytorch/torchtitan", "pytorch/torchtitan"),
    ("bigscience", "BLOOM (bigscience)"),
    ("2104.04473", "Narayanan et al. 2021"),
    ("KempnerForge", "KempnerInstitute/KempnerForge"),
    ("NeMo/Automodel", "NVIDIA-NeMo/Automodel"),
    ("OLMo-core", "allenai/OLMo-core"),
    ("FlagPerf", "FlagOpen/FlagPerf"),
    ("gpu-recipes", "AI-Hypercomputer/gpu-recipes"),
    ("xtuner", "InternLM/xtuner"),
    ("efficient-parallelization-layouts", "Aleph Alpha (Hagemann et al. 2023)"),
    ("Megatron-MoE-ModelZoo", "yanring/Megatron-MoE-ModelZoo"),
    ("NousResearch", "NousResearch/torchtitan"),
    ("fms-fsdp", "foundation-model-stack/fms-fsdp"),
    ("pith-train", "mlc-ai/pith-train"),
)


@dataclass(frozen=True)
class PublishedRun:
    """One published run. `tokens_per_s` per GPU and `memory_gb` (1e9) as measured, None where not; `apart`: why it is
    reported by itself; `memory_kind`: allocated (of the last stage), reserved, or used (as nvidia-smi says); `kept_out`: no
    fit may see it."""

    id: str
    source: str
    group: str
    job: PlannedJob
    tokens_per_s: float | None
    memory_gb: float | None
    memory_kind: str
    apart: str | None = None
    oom: bool = False
    kept_out: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def assumed_recompute(self) -> bool:
        return RECOMPUTE_ASSUMED in self.assumed

    @property
    def is_moe(self) -> bool:
        return self.job.model.moe.num_experts > 0


def short_source(text: str) -> str:
    """Who published: what rows are grouped by. A project's pages of the same kind are one source."""
    for words, name in SOURCES:
        if words in text:
            return name
    text = re.split(r" @ | \(blob|, section|, read in| Tables? | appendix| sec | \+ ", text)[0]
    return re.sub(r"README(_\w+)?\.md", "README", text).strip()[:70] or "?"


def mend(row: dict[str, Any]) -> dict[str, Any]:
    """Known slips of the collection, put right (see data/README.md)."""
    identity, name = str(row.get("id") or ""), str((row.get("model") or {}).get("name") or "")
    if identity.startswith("bloom-45-"):
        return row | {"dp": 4, "n_gpus": 4 * int(row["tp"]) * int(row["pp"])}
    if name == "Nemotron-4-340B" and not row.get("vpp"):
        return row | {"vpp": 12 if int(row.get("pp") or 1) * 12 <= 98 else 8}
    if identity == "megatron-readme-gpt3-a100":
        return row | {"recompute": "full"}
    return row


def excluded(row: dict[str, Any]) -> str | None:
    """Why a row's speed isn't comparable (the rules of data/README.md), or None."""
    identity, source, notes = str(row.get("id") or ""), str(row.get("source") or ""), str(row.get("notes") or "").lower()
    name = str((row.get("model") or {}).get("name") or "")
    if row.get("kind") in ("layer_time", "memory_formula", "run"):
        return f"not a measured training step ({row['kind']})"
    if "token drop" in notes or "token-drop" in notes or "tokendrop" in notes:
        return "drops tokens"
    if identity.startswith("mlm-") or "tests/functional_tests" in source:
        return "CI timing"
    if "zero-3 (deepspeed, no model parallel)" in str(row.get("zero") or "").lower():
        return "ZeRO-3 of 2021"
    if "dgxc" in source and "DeepSeek" in name:
        return "untuned recipe"
    if name.startswith("Moonlight") and row.get("global_batch") == 4:
        return "global batch of 4"
    if name.startswith("BLOOM-like") and "18B" in identity:
        return "TFLOPs contradict the batch"
    return None


def _key(row: dict[str, Any]) -> tuple[object, ...]:
    names = (
        "gpu",
        "n_gpus",
        "tp",
        "pp",
        "vpp",
        "ep",
        "cp",
        "seq_len",
        "micro_batch",
        "global_batch",
        "precision",
        "zero",
        "task",
    )
    source = str(row.get("source") or "").split(" @ ")[0].split("-archive")[0].split(".md")[0]
    return (source, (row.get("model") or {}).get("name"), *(row.get(name) for name in names))


def _superseded(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Megatron-Bridge rows of which a later release is over 1.3 times as fast in the same configuration."""
    best: dict[tuple[object, ...], float] = {}
    for row in rows:
        speed = (row.get("measured") or {}).get("tokens_per_s_per_gpu")
        if str(row.get("id", "")).startswith("bridge-2") and speed:
            best[_key(row)] = max(best.get(_key(row), 0.0), speed)
    return {row["id"] for row in rows if str(row.get("id", "")).startswith("bridge-2")
            and best.get(_key(row), 0.0) > 1.3 * ((row.get("measured") or {}).get("tokens_per_s_per_gpu") or 1e30)}  # fmt: skip


def runs_of(rows: Sequence[dict[str, Any]], what: str) -> tuple[list[PublishedRun], Counter[str]]:
    """(comparable runs, reason → rows left out). `what`: time or memory."""
    runs: list[PublishedRun] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    sound = [row for row in (with_typed_values(row, TEXTS) for row in rows) if not is_malformed(row)]
    if len(sound) < len(rows):
        skipped["a field is not what its name says"] = len(rows) - len(sound)
    slow = _superseded(sound)
    for position, raw in enumerate(sound):
        try:
            run = _run(mend(raw), position, what)
            fingerprint = f"{_key(raw)}{raw.get('recompute')}{raw.get('notes')}{run.tokens_per_s}{run.memory_gb}"
            if fingerprint in seen:
                raise UnusableRow("exact duplicate")
            seen.add(fingerprint)
            runs.append(replace(run, apart="superseded release" if run.id in slow else run.apart))
        except UnusableRow as reason:
            skipped[str(reason)] += 1
    return runs, skipped


def runs_to_fit(rows: Sequence[dict[str, Any]]) -> list[PublishedRun]:
    """The runs that a fit may see: comparable, not reported apart, not kept out."""
    return [run for run in runs_of(rows, "time")[0] if run.apart is None and not run.kept_out]


def _run(row: dict[str, Any], position: int, what: str) -> PublishedRun:
    if (row.get("model") or {}).get("linear_attention"):
        raise UnusableRow("linear attention (gated delta net)")
    if row.get("task") == "lora":
        raise UnusableRow("LoRA")
    if what == "time" and (reason := excluded(row)):
        raise UnusableRow(reason)
    memory, kind = memory_of(row)
    oom = bool((row.get("measured") or {}).get("oom"))
    if what == "memory" and (row.get("model") or {}).get("args", {}).get("fine-grained-activation-offloading"):
        raise UnusableRow("offloads activations")
    if what == "memory" and "distill" in str((row.get("model") or {}).get("name")):
        raise UnusableRow("two models (distillation)")
    if what == "memory" and not oom and (memory is None or (row.get("usable") or {}).get("memory") is False):
        raise UnusableRow("no memory measured" if memory is None else "memory not comparable")
    if what == "time" and (row.get("usable") or {}).get("time_full") is False:
        raise UnusableRow("its collection calls the speed not comparable")
    if what == "time" and row.get("global_batch") is None:
        raise UnusableRow("global batch not stated")
    job, assumed = job_of(row)
    speed = speed_of(row, job)
    if what == "time" and not speed:
        raise UnusableRow("no speed measured")
    odd = not job.flash and job.model.hidden_size // job.model.attention.num_heads % 8
    name, source = str((row.get("model") or {}).get("name")), str(row.get("source") or "?")
    fragmented = oom and what == "memory" and "fragmentation" in str(row.get("notes") or "")
    reasons = {"allocator fragmentation": fragmented, "head dim not divisible by 8": odd,
               "unreleased draft": row.get("confidence") == "branch draft",
               "power-limited GPUs": "power-limited" in str(row.get("notes") or "")}  # fmt: skip
    apart = next((reason for reason, holds in reasons.items() if holds), None)
    return PublishedRun(
        id=str(row.get("id") or f"row {position + 1}"),
        source=short_source(source),
        group=f"{short_source(source)} | {name} | {job.machine.gpu.name}",
        job=job,
        tokens_per_s=speed,
        memory_gb=memory,
        memory_kind=kind,
        apart=apart,
        oom=oom,
        kept_out=bool(row.get("kept_out")),
        assumed=assumed,
    )
