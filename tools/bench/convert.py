"""Speed and memory of `phalanx convert`, compared with a copy of the same files on the same disk, in one run.

In: how many GiB. Out: MB/s of copy, import and export (each in a process of its own, with fsync), their ratio, and peak memory.
    phalanx bench convert --gib 4

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from configs import own_packages
from pretrain.run.files import write_json
from tools.convert.exporting import planned_tensors
from tools.convert.families.qwen3_moe import QWEN3_MOE
from tools.convert.file_plan import WriteUnit, plan_files
from tools.convert.output_folder import OutputFolder, WorkShare
from tools.convert.tensors.dtypes import FLOATS, Array
from tools.convert.tensors.weight_map import make_weight_map

CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
LAYER_GIB = 1.17
"""Size of one layer of Qwen3-30B-A3B in bf16. The two tables take 1.16 GiB more."""

COPY = """
import os, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.mkdir()
for file in sorted(source.iterdir()):
    with open(file, "rb") as read, open(target / file.name, "wb") as write:
        while block := read.read(8 << 20):
            write.write(block)
        write.flush()
        os.fsync(write.fileno())
"""


def make_source(folder: Path, gib: float) -> int:
    """Write a model of about `gib` GiB with random bits. Returns the number of bytes."""
    layers = max(1, round((gib - 1.16) / LAYER_GIB))
    config = CONFIG | {"num_hidden_layers": layers}
    model, _ = QWEN3_MOE.to_model(config)
    weight_map = make_weight_map(QWEN3_MOE, model)
    dtypes = dict.fromkeys(weight_map.hf_shapes, "BF16")
    count = max(2, round(gib))
    files = plan_files(list(planned_tensors(weight_map, dtypes, {})), int(gib * 2**30 / count), _name, {})
    generator = np.random.default_rng(0)

    def fill(unit: WriteUnit, out: Array) -> None:
        # Positive numbers below 1.
        out[...] = generator.integers(0x3800, 0x3F00, out.shape, dtype=FLOATS["BF16"])

    place = OutputFolder(folder, files, config, force=False)
    place.write(WorkShare(), 1, fill)

    def complete(partial: Path, sums: dict[str, dict[str, int]]) -> None:
        write_json(partial / "config.json", config)
        write_json(
            partial / "model.safetensors.index.json",
            {"metadata": {}, "weight_map": {key: name for name, keys in sums.items() for key in keys}},
        )

    place.finish(WorkShare(), complete)
    return sum(file.num_bytes for file in files)


def _name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def measure(words: list[str]) -> tuple[float, float, float]:
    """(elapsed seconds, CPU seconds, peak MiB) of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)} ended with status {status}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="phalanx bench convert", description="Compare conversion with a copy of the same files."
    )
    parser.add_argument("--gib", type=float, default=4.0, help="size of the model (default: 4)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the best counts (default: 2)")
    parser.add_argument("--dir", type=Path, help="disk to measure (default: the temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.dir) as made:
        folder = Path(made)
        size = make_source(folder / "hf", args.gib)
        phalanx = [*own_packages.command(sys.executable, "tools.cli"), "convert"]
        commands = {
            "copy": [sys.executable, "-c", COPY, str(folder / "hf"), str(folder / "out_copy")],
            "import": [*phalanx, "import", str(folder / "hf"), str(folder / "out_import")],
            "export": [*phalanx, "export", str(folder / "checkpoint"), str(folder / "out_export")],
        }
        best: dict[str, Any] = {}
        for turn in range(args.repeats):
            for name, words in commands.items():
                seconds, busy_s, peak = measure(words)
                if name == "import" and turn == 0:
                    (folder / "out_import").rename(folder / "checkpoint")
                else:
                    shutil.rmtree(folder / f"out_{name}")
                known = best.get(name, {"s": float("inf"), "cpu_s": float("inf"), "peak_mib": 0.0})
                best[name] = {
                    "s": min(seconds, known["s"]),
                    "cpu_s": min(busy_s, known["cpu_s"]),
                    "peak_mib": max(peak, known["peak_mib"]),
                }
        for result in best.values():
            result["mb_per_s"] = size / result["s"] / 1e6
            result["of_copy"] = best["copy"]["s"] / result["s"]
        print(json.dumps({"bytes": size, **best}, indent=2))
