"""How long `phalanx plan CONFIG --search` takes on one core, for thousands of GPUs.

In: models, by name. Out: CPU seconds of a search for 16,384 and for 100,352 GPUs, and their share of the limit of each.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from configs.load import load_config
from parallel.memory.hardware import make_machine
from pretrain.data.tokenizer import vocab_size
from tools.planner.foreign import FOREIGN_ENGINES
from tools.planner.search import search

# GPUs, and CPU seconds that a search for them may take.
LIMITS_S = {16_384: 5.0, 100_352: 30.0}
MODELS = ("deepseek_v3", "llama3_405b")


def measure(model: str, num_gpus: int, engine: str | None = None) -> dict[str, Any]:
    """One row of the result: a search for H100s, two sequences a GPU and step, planned as an engine of others if one is named."""
    words = [f"launch.nodes={num_gpus // 8}", "cluster.gpu=H100", f"batch.global_batch_seqs={2 * num_gpus}", "run.steps=1000"]
    config = load_config(f"model/{model}", [*words, "launch.processes_per_node=8", "batch.seq_length_tokens=4096"]).config
    start_s = time.process_time()
    result = search(config, vocab_size(config) or 0, make_machine(config), engine=engine)
    cpu_s, limit_s = time.process_time() - start_s, LIMITS_S[num_gpus]
    return {
        "model": model,
        "gpus": num_gpus,
        "cpu_s": round(cpu_s, 2),
        "limit_s": limit_s,
        "share_of_limit": round(cpu_s / limit_s, 3),
        "tried": result.tried,
        "legal": len(result.candidates),
    }


def main(argv: list[str]) -> int:
    """Print the table, or with --json one JSON document. Exit 1 when a search takes longer than its limit."""
    parser = argparse.ArgumentParser(prog="phalanx bench search", description="CPU time of a search for layouts, on one core.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="shipped models (default: %(default)s)")
    parser.add_argument("--engine", choices=FOREIGN_ENGINES, help="search as this engine of others would run the layouts")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args(argv)
    rows = [measure(model, num_gpus, args.engine) for model in args.models for num_gpus in LIMITS_S]
    if args.json:
        print(json.dumps({"rows": rows}))
    else:
        for row in rows:
            took = f"{row['cpu_s']:.2f} of {row['limit_s']:g} CPU seconds"
            print(f"{row['model']}, {row['gpus']:,} GPUs: {took}, {row['tried']:,} layouts tried, {row['legal']} legal ones")
    return int(any(row["cpu_s"] > row["limit_s"] for row in rows))
