"""Layouts that their publishers chose as the best for a model and a machine, as configs to search.

In: the row's id in the shipped published runs, or the row itself where the collection has no micro-batch for it. Out: the
config with the layout left open, the row's job, and its degrees.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from configs.load import load_config
from configs.schema import Config
from parallel.memory.job import PlannedJob
from tools.planner.candidates import Degrees
from tools.planner.published.row import job_of
from tools.planner.published.validate import ROWS
from tools.planner.search import search

# arXiv 2504.14960 (MoE Parallel Folding), table 2: the fastest of five ways, 128 H100. Tuned micro-batch not stated.
MIXTRAL: dict[str, Any] = {
    "id": "folding-t2", "source": "arXiv 2504.14960", "gpu": "H100", "n_gpus": 128, "tp": 2, "pp": 8, "ep": 8, "etp": 1,
    "seq_len": 4096, "micro_batch": 1, "global_batch": 256, "precision": "bf16",
    "model": {"name": "Mixtral-8x22B", "num_layers": 56, "hidden_size": 6144, "ffn_hidden_size": 16384, "num_heads": 48,
              "num_kv_heads": 8, "head_dim": 128, "vocab_size": 32000, "num_experts": 8, "topk": 2,
              "moe_ffn_hidden_size": 16384, "mlp": "swiglu"},
}  # fmt: skip


@cache
def rows() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in json.loads(ROWS.read_text(encoding="utf-8"))} | {MIXTRAL["id"]: MIXTRAL}


def published(name: str) -> tuple[Config, PlannedJob, Degrees]:
    """(config to search, the published job, its degrees)."""
    job, _ = job_of(rows()[name])
    world, layout = job.layout.world_size, job.layout
    nodes = max(1, world // 8)
    words = [f"launch.nodes={nodes}", f"launch.processes_per_node={world // nodes}", f"model.vocab_size={job.vocab}",
             f"batch.global_batch_seqs={job.global_batch}", f"batch.seq_length_tokens={job.seq_length}",
             f"cluster.gpu={job.machine.gpu.name}", "run.steps=1000"]  # fmt: skip
    if job.compute != "bf16":
        words += ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"]
    config = load_config("cluster/h100x8", words).config
    job.model.vocab_size = job.vocab
    config.model = job.model
    degrees = Degrees(layout.tensor, layout.context, layout.pipeline, layout.expert, layout.expert_tensor)
    return config, job, degrees


def rank(name: str) -> tuple[int | None, int]:
    """(place of the published degrees among the candidates from 1 on, None when it isn't among them; candidates)."""
    config, job, degrees = published(name)
    candidates = search(config, job.vocab, job.machine).candidates
    place = next((place for place, candidate in enumerate(candidates, start=1) if candidate.degrees == degrees), None)
    return place, len(candidates)
