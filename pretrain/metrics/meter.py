"""A step's numbers as one row. In: the engine's result, the position and the duration. Out: a dict, alike under any layout.

tflops_per_gpu is the model's FLOPs divided by time and ranks. parallel/flops.py counts them, with causal attention and active
experts only, without recomputation. mfu is tflops_per_gpu divided by the GPU's dense bf16 peak of configs/gpus.json. It is left
out when the peak is unknown.
"""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config
from parallel.flops import training_flops
from parallel.layout import Layout
from pretrain.checkpoint.restore import TrainingPosition
from pretrain.engine.base import StepResult

GIB = 2**30


@cache
def gpu_table() -> dict[str, dict[str, Any]]:
    """The rows of configs/gpus.json by GPU name. Each row names its source."""
    text = (Path(__file__).resolve().parents[2] / "configs" / "gpus.json").read_text()
    return {row["name"]: row for row in json.loads(text)["gpus"]}


@dataclass(frozen=True)
class Meter:
    """The constants of a run's rows.

    `flops_per_token`: model FLOPs of a training token over all ranks. `peak_tflops`: the GPU's dense bf16 peak; None: unknown.
    """

    flops_per_token: float
    world_size: int
    peak_tflops: float | None

    def row(self, position: TrainingPosition, result: StepResult, rate: float, tokens: int, step_time_s: float) -> dict[str, Any]:
        """The row of the step that led to `position`.

        `rate`: the learning rate. `tokens`: input tokens of the step over all ranks. `step_time_s`: its duration in seconds.
        """
        tokens_per_s = tokens / step_time_s
        tflops = tokens_per_s * self.flops_per_token / self.world_size / 1e12
        row: dict[str, Any] = {
            "step": position.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "tokens": position.tokens,
            "samples": position.consumed_samples,
            "step_time_s": round(step_time_s, 6),
            "tokens_per_s": round(tokens_per_s, 2),
            "tflops_per_gpu": round(tflops, 6),
        }
        return row | ({"mfu": round(tflops / self.peak_tflops, 5)} if self.peak_tflops else {})


def make_meter(config: Config, layout: Layout, vocab_size: int) -> Meter:
    """A meter with the config's model FLOPs a token and, for a known GPU, its peak in bf16 TFLOP/s."""
    flops = training_flops(config.model, vocab_size, config.batch.seq_length_tokens).per_token
    gpu = gpu_table().get(config.cluster.gpu or "")
    return Meter(flops, layout.world_size, gpu["peak_dense_bf16_tflops"] if gpu else None)


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory of this rank so far in GiB: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
