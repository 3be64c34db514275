"""`phalanx generate` and `phalanx evaluate`: text from a checkpoint, and its loss on tokenised data. On the CPU, fp32.

In: arguments, the command's name first. Out: an exit code. Raises ConfigError for bad input.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from pretrain.run.process import importing


def main(argv: list[str]) -> int:
    """Run the command argv[0], generate or evaluate, with the arguments after it. Returns the exit code. Raises ConfigError."""
    args = {"generate": _generate_parser, "evaluate": _evaluate_parser}[argv[0]]().parse_args(argv[1:])
    # Megatron-Core chooses its CPU parts when it is imported. A GPU, which may be busy with training, must stay hidden.
    if getattr(args, "device", "cpu") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if argv[0] == "generate" and (args.checkpoint / "config.json").is_file():
        with importing():
            from tools.inference.generate_exported import generate_exported  # noqa: PLC0415  (torch and transformers: --help needs neither)

        prompts = args.prompt or [""]
        result = generate_exported(args.checkpoint, prompts, args.max_new_tokens, args.temperature, args.top_k, args.seed)
        text = "\n\n".join(part["prompt"] + part["text"] for part in result["texts"])
    elif argv[0] == "generate":
        with importing():
            from tools.inference.generate import generate  # noqa: PLC0415  (torch and megatron-core: --help needs neither)

        result = generate(
            args.checkpoint, args.prompt or [""], args.max_new_tokens, args.temperature, args.top_k, args.seed, args.tokenizer
        )
        text = "\n\n".join(part["prompt"] + part["text"] for part in result["texts"])
    elif args.tasks:
        result = _run_tasks(args)
        scores = [f"{name:<40}  {value:.4f}" for name, value in result["scores"].items()]
        text = "\n".join([f"{result['checkpoint']}:", *scores])
    else:
        with importing():
            from tools.inference.evaluate import evaluate  # noqa: PLC0415  (as above)

        result = evaluate(args.checkpoint, args.data, args.max_tokens, args.seq_length, args.batch_seqs)
        text = (
            f"{result['checkpoint']}: loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}, "
            f"over {result['tokens']:,} tokens of {', '.join(result['data'])}"
        )
    for note in result.get("notes", []):
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(result, ensure_ascii=False) if args.json else text)
    return 0


def _run_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """The scores of lm-evaluation-harness. Raises ConfigError."""
    if find_spec("lm_eval") is None:
        rule = "needs lm-evaluation-harness, which is not installed"
        raise ConfigError(Problem("--tasks", args.tasks, rule, "pip install 'phalanx[evaluate]'"))
    with importing():
        from tools.inference.harness import Request, evaluate_tasks  # noqa: PLC0415  (torch, transformers and lm_eval)

    tasks = tuple(filter(None, args.tasks.split(",")))
    request = Request(tasks, args.include_path, args.num_fewshot, args.limit, args.batch_seqs, args.device)
    return evaluate_tasks(args.checkpoint, request, args.tokenizer)


def _generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phalanx generate",
        description="Generate text from a checkpoint. Meant for a first look: every token costs a pass over the whole text.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN_DIR|CHECKPOINT|HF_DIR",
        help="a run folder (its newest one), a checkpoint, or a Hugging Face folder (by transformers)",
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="the beginning of the text; may be given several times")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="length of the answer (default: 64)")
    parser.add_argument("--temperature", type=_number, default=0.0, metavar="T", help="0: the most likely token (default)")
    parser.add_argument("--top-k", type=_positive, metavar="K", help="draw from the K most likely tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: 0)")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer of the model, when the run's own file is gone")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phalanx evaluate",
        description="Measure loss and perplexity of a checkpoint on tokenized data, or its scores on tasks.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN_DIR|CHECKPOINT",
        help="a run folder (its newest checkpoint), or a checkpoint; with --tasks also a Hugging Face folder",
    )
    parser.add_argument(
        "--data", nargs="+", metavar="PREFIX", help="PREFIX.bin and PREFIX.idx (default: the validation data of the run)"
    )
    parser.add_argument(
        "--max-tokens", type=_positive, default=65536, metavar="N", help="predicted tokens per prefix (default: 65536)"
    )
    parser.add_argument("--seq-length", type=_positive, metavar="TOKENS", help="sequence length (default: the run's, else 512)")
    parser.add_argument("--batch-seqs", type=_positive, default=4, metavar="N", help="sequences per pass (default: 4)")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness, instead of data")
    tasks.add_argument(
        "--tasks", metavar="NAME,…", help="names of the tasks; the scores are also written to the run's evaluations.jsonl"
    )
    tasks.add_argument("--include-path", metavar="DIR", help="a folder with YAML files of own tasks")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    tasks.add_argument("--limit", type=_positive, metavar="N", help="documents of each task (default: all)")
    tasks.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: in fp32 (default); cuda: in bf16")
    tasks.add_argument("--tokenizer", metavar="PATH", help="tokenizer of the model, when the run's own file is gone")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer of at least 1")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e6:
        raise argparse.ArgumentTypeError("must be a number from 0 to 1e6")
    return value
