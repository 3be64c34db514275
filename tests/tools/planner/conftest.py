"""Jobs and configs that the planner's tests share."""

from __future__ import annotations

from configs.load import load_config
from configs.schema import Config

WORDS = ("cluster.gpu=H100-SXM-80GB", "launch.processes_per_node=8", "run.steps=1000", "batch.seq_length_tokens=4096")


def config_of(model: str, *words: str) -> Config:
    """A shipped model on H100 nodes of 8, with further key=value words."""
    return load_config(f"model/{model}", [*WORDS, *words]).config
