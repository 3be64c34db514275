"""The `metrics` section: sinks, what a row of the record holds beside the loss, profiles.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

from configs.fields import key


@dataclass
class Wandb:
    project: str = key("phalanx", "W&B project.")
    entity: Optional[str] = key(None, "W&B user or team. null: the default of the API key.")
    mode: str = key(
        "auto", "auto: online when an API key is found, else offline.", choices=("auto", "online", "offline", "disabled")
    )
    group: Optional[str] = key(None, "W&B group of the run.")
    tags: List[str] = key(factory=list, doc="W&B tags of the run.")
    finish_timeout_s: float = key(30.0, "Longest time that the end of a run waits for the W&B server, in seconds.", above=0)
    expert_picture: bool = key(
        False, "At the end of each attempt, show the load of the experts by layer and step as a picture. Needs phalanx[report]."
    )
    report: bool = key(
        False, "At the end of each attempt, add the page of `phalanx report` as an artifact. Needs phalanx[report]."
    )


@dataclass
class Mlflow:
    tracking_uri: Optional[str] = key(
        None, "MLflow's store. null: MLFLOW_TRACKING_URI, or without it an sqlite file in the folder mlflow of the run."
    )
    experiment: str = key("phalanx", "MLflow experiment.")
    finish_timeout_s: float = key(
        30.0, "Longest time that the end of a run waits for MLflow, and for TensorBoard's files, in seconds.", above=0
    )


@dataclass
class Profile:
    start_step: Optional[int] = key(None, "First profiled step. null: no profile.", low=1)
    num_steps: int = key(2, "Number of profiled steps.", low=1)
    ranks: List[int] = key(factory=lambda: [0], doc="Ranks that are profiled.", low=0)
    memory_snapshot: bool = key(False, "Also write a snapshot of CUDA memory. Needs a GPU.")


@dataclass
class Metrics:
    sinks: List[str] = key(
        factory=lambda: ["console", "jsonl", "wandb"],
        doc="Where metrics go. The record metrics.jsonl is always written.",
        choices=("console", "jsonl", "wandb", "tensorboard", "mlflow"),
    )
    log_interval_steps: int = key(1, "Steps between two lines on the console. The record has every step.", low=1)
    attention_logits: bool = key(
        False,
        "Report the largest attention logit of each step. It costs a second product of queries and keys. QK-clip computes it anyway.",
    )
    attention_logit_layers: int = key(
        8, "Layers, evenly spread, that report their largest attention logit one by one. 0: only that of all layers.", low=0
    )
    expert_load_layers: int = key(
        8,
        "MoE layers, evenly spread, that report the load of their experts one by one. 0: only the summary of all layers.",
        low=0,
    )
    expert_counts_interval_steps: int = key(
        10,
        "Steps between two rows of experts.jsonl, which counts the tokens of each expert in each MoE layer. The interval doubles "
        "when the file is full, at 256 rows or some 16 MiB. 0: no such file.",
        low=0,
    )
    source_losses: int = key(
        8,
        "In a blend: sources, those of the largest shares, that report their training loss; the others share one number. 0: none.",
        low=0,
    )
    prometheus_port: Optional[int] = key(
        None, "Port of 127.0.0.1 at which rank 0 serves the newest row as Prometheus text. null: none.", low=1, high=65535
    )
    wandb: Wandb = key(factory=Wandb)
    mlflow: Mlflow = key(factory=Mlflow)
    profile: Profile = key(factory=Profile)
