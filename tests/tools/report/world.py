"""Run folders for the report: written row by row, as a run writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from configs.load import load_config
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.folder import RunFolder

START_S = 1_780_000_000.0


def row(step: int, loss: float | None = None) -> dict[str, Any]:
    value = 7 * math.exp(-step / 30) + 2 if loss is None else loss
    return {
        "step": step, "loss": value, "grad_norm": 1 / step, "lr": 1e-3, "tokens": 4096 * step, "samples": 32 * step,
        "step_time_s": 0.5, "tokens_per_s": 8192.0, "tflops_per_gpu": 0.01, "memory_gib/stage_0": 0.5, "memory_gib/stage_1": 0.4,
        "aux_loss": 1.0, "expert_load_max_over_mean": 1.5,
    }  # fmt: skip


def add_rows(folder: RunFolder, first: int, last: int) -> None:
    with open(folder.metrics, "a") as file:
        for step in range(first, last + 1):
            extra = {"val_loss": 3 - step / 100} if step % 10 == 0 else {}
            file.write(json.dumps(row(step) | extra) + "\n")


def make_run(path: Path, steps: int = 40, *words: str) -> RunFolder:
    """A run of two attempts, the second of which begins with step 21, with a save and a skipped step."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    loaded = load_config("quickstart", ["run.steps=40", "model.vocab_size=512", *words])
    for number, layout in ((1, "pipeline: 2"), (2, "pipeline: 1")):
        folder.launch_dir(number).mkdir(parents=True)
        (folder.launch_dir(number) / "config.yaml").write_text(loaded.text.replace("pipeline: 2", layout))
    folder.config.write_text(loaded.text)
    origin = {"origin": loaded.origin, "packages": {"torch": "2.13.0"}, "code_version": "v1"}
    folder.provenance.write_text(json.dumps(origin))
    add_rows(folder, 1, steps)
    begun = {"wandb_id": "w", "logs": None, "slurm_job": None}
    append_event(folder, 1, EventKind.ATTEMPT, START_S, **begun, began=START_S - 2)
    append_event(folder, 1, EventKind.TRAINING, START_S + 5, step=1)
    append_event(folder, 1, EventKind.SAVED, START_S + 15, step=20, folder="step_0000020", seconds=0.5, blocked_s=0.1)
    append_event(folder, 1, EventKind.OUTCOME, START_S + 16, state="stopped", why="SIGINT after step 20", step=20)
    append_event(folder, 2, EventKind.ATTEMPT, START_S + 30, **begun, began=START_S + 28)
    append_event(folder, 2, EventKind.TRAINING, START_S + 34, step=21)
    refused = {"step": 30, "samples": 960, "loss": 9.0, "grad_norm": 1.0, "rule": "loss 9.0 above 5.0"}
    append_event(folder, 2, EventKind.SKIPPED_STEP, START_S + 39, **refused)
    append_event(folder, 2, EventKind.OUTCOME, START_S + 45, state="finished", why="all 40 steps are done", step=40)
    outcome = {"attempt": 2, "state": "finished", "why": "all 40 steps are done", "step": 40, "consumed_samples": 1280}
    folder.outcome.write_text(json.dumps(outcome | {"time": START_S + 45}))
    counts = [
        {"step": step, "tokens": 64, "layers": [1, 3], "counts": [[40, 40, 48, 0], [32, 32, 32, 32]]} for step in (10, 20, 30)
    ]
    folder.experts.write_text("".join(json.dumps(one) + "\n" for one in counts))
    return folder
