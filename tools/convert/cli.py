"""`phalanx convert`: import and export of Hugging Face models, inspection of either format, verification by logits.

In: arguments. Out: an exit code. Raises ConfigError for bad input; tools/cli.py prints it and exits 2.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, TypeAlias

from configs.errors import ConfigError, Problem
from pretrain.run.process import importing
from tools.convert.output_folder import WorkShare

EPILOG = """\
from Hugging Face and back:
  phalanx convert import ~/models/Qwen3-30B-A3B checkpoints/qwen3
  phalanx convert verify checkpoints/qwen3 ~/models/Qwen3-30B-A3B
  phalanx convert export runs/quickstart exported

from dense to MoE:
  phalanx convert upcycle ~/models/Qwen3-4B checkpoints/moe --experts 8 --top-k 2

An import holds weights only: a run that starts from it (checkpoint.load=PATH) has a fresh optimizer.
After a kill or a full disk, the same command continues where the conversion stopped.
Several processes can share one conversion: --shard 0/4 … --shard 3/4, in any order.
"""


def main(argv: list[str]) -> int:
    """Run one subcommand. Returns the exit code: 0, or 1 when `verify` finds a difference. Raises ConfigError for bad input."""
    args = _parser().parse_args(argv)
    result, text = args.run(args)
    for note in result.get("notes", []):
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(result, ensure_ascii=False) if args.json else text)
    return int(result.get("ok") is False)


Subcommands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="phalanx convert", description="Convert checkpoints from and to Hugging Face.", epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON document on stdout")
    work = _work_options(shared)
    _add_import(commands, work)
    _add_export(commands, work)
    _add_upcycle(commands, work)
    _add_inspect(commands, shared)
    _add_verify(commands, shared)
    return parser


def _work_options(shared: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options of a conversion that writes files: import and export."""
    work = argparse.ArgumentParser(add_help=False, parents=[shared])
    work.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp32", "fp16"),
        default="keep",
        help="element type of the weights (default: keep, the type in the source)",
    )
    work.add_argument(
        "--shard",
        type=_share,
        default=WorkShare(),
        metavar="I/N",
        help="write the I-th of N shares of the files; the share that ends last completes OUT",
    )
    work.add_argument(
        "--workers",
        type=_positive,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="number of threads (default: %(default)s)",
    )
    work.add_argument("--force", action="store_true", help="replace OUT when it exists")
    return work


def _add_import(commands: Subcommands, work: argparse.ArgumentParser) -> None:
    get = commands.add_parser(
        "import",
        parents=[work],
        help="make a checkpoint (weights only) from a Hugging Face or Megatron-LM torch_dist folder",
    )
    get.add_argument("source", type=Path, metavar="HF_DIR|MEGATRON_DIR", help="the folder to read")
    get.add_argument("out", type=Path, metavar="OUT", help="the checkpoint to write")
    get.add_argument("--model", metavar="PRESET|YAML", help="the model, when a Megatron-LM checkpoint does not state it")
    get.set_defaults(run=_import)


def _add_export(commands: Subcommands, work: argparse.ArgumentParser) -> None:
    put = commands.add_parser("export", parents=[work], help="make a Hugging Face folder from a checkpoint")
    put.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest checkpoint)")
    put.add_argument("out", type=Path, metavar="HF_DIR", help="the folder to write")
    put.add_argument(
        "--family", metavar="NAME", help="model family to write (default: the first family that can express the model)"
    )
    put.add_argument("--tokenizer", metavar="PATH", help="tokenizer of the model, when the run's own file is gone")
    put.set_defaults(run=_export)


def _add_upcycle(commands: Subcommands, work: argparse.ArgumentParser) -> None:
    grow = commands.add_parser(
        "upcycle",
        parents=[work],
        help="make an MoE checkpoint from a dense Hugging Face folder, with the same logits",
    )
    grow.add_argument("source", type=Path, metavar="DENSE", help="the Hugging Face folder of a dense model")
    grow.add_argument("out", type=Path, metavar="OUT", help="the checkpoint to write")
    grow.add_argument("--experts", type=_positive, default=8, metavar="N", help="copies of the MLP (default: 8)")
    grow.add_argument("--top-k", type=_positive, default=2, metavar="K", help="copies that process a token (default: 2)")
    grow.add_argument(
        "--granularity",
        type=_positive,
        default=1,
        metavar="G",
        help="cut each copy into G experts of 1/G of the width; N x G experts, K x G of them chosen (default: 1)",
    )
    grow.add_argument("--shared-expert", action="store_true", help="one more copy that processes every token")
    grow.add_argument(
        "--noise",
        type=_noise,
        default=0.0,
        metavar="S",
        help="add normal noise of standard deviation S to routed experts (default: 0, the same logits)",
    )
    grow.add_argument("--seed", type=int, default=0, help="seed of router and noise (default: 0)")
    grow.set_defaults(run=_upcycle)


def _add_inspect(commands: Subcommands, shared: argparse.ArgumentParser) -> None:
    look = commands.add_parser(
        "inspect", parents=[shared], help="list the model, tensors and types of a folder, and check that it is complete"
    )
    look.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, a run folder or a Hugging Face folder")
    look.set_defaults(run=_inspect)


def _add_verify(commands: Subcommands, shared: argparse.ArgumentParser) -> None:
    prove = commands.add_parser("verify", parents=[shared], help="compare logits of the Megatron-Core model with transformers'")
    prove.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest checkpoint)"
    )
    prove.add_argument("hf", type=Path, metavar="HF_DIR", help="the Hugging Face folder to compare with")
    prove.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="compare only the first N layers (for a model that does not fit into memory)",
    )
    prove.add_argument("--tokens", type=_positive, default=64, metavar="N", help="tokens per sequence (default: 64)")
    prove.add_argument("--sequences", type=_positive, default=2, metavar="N", help="number of sequences (default: 2)")
    prove.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="X",
        help="largest allowed |difference| of a logit; multiplied by max |logit| / 10 when that exceeds 1 (default: 1e-3)",
    )
    prove.set_defaults(run=_verify)


def _share(text: str) -> WorkShare:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError("must be I/N with I from 0 to N-1, for example 0/4")
    return WorkShare(int(match[1]), int(match[2]))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer of at least 1")
    return int(text)


def _noise(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number from 0 on")
    return value


def _folder(path: Path, name: str) -> Path:
    if not path.is_dir():
        raise ConfigError(Problem(name, str(path), "must be a folder", "check the path"))
    return path


def _import(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tools.convert.importing import import_model  # noqa: PLC0415  (the subcommand's modules only)

    folder = _folder(args.source, "HF_DIR|MEGATRON_DIR")
    result = import_model(folder, args.out, args.dtype, args.shard, args.workers, args.force, args.model)
    text = f"{result['tensors_read']} tensors of {result['family']} read, {result['tensors_written']} written: {args.out}"
    if not result["finished"]:
        return result, f"{text}\nother shares are still being written; the share that ends last completes the folder"
    return (
        result,
        f"{text}\nweights only: checkpoint.load={args.out} starts a run with a fresh optimizer; model: {args.out}/model.yaml",
    )


def _upcycle(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tools.convert.upcycle import Recipe, upcycle  # noqa: PLC0415  (the subcommand's modules only)

    recipe = Recipe(args.experts, args.top_k, args.granularity, args.shared_expert, args.noise, args.seed)
    folder = _folder(args.source, "DENSE")
    result = upcycle(folder, args.out, recipe, args.dtype, args.shard, args.workers, args.force)
    return result, (
        f"{result['experts']} experts of width {result['expert_width']}, {result['top_k']} for each token: {args.out}\n"
        f"checkpoint.load={args.out} starts a run from it; model: {args.out}/model.yaml"
    )


def _export(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tools.convert.exporting import export_model  # noqa: PLC0415  (the subcommand's modules only)

    result = export_model(
        args.checkpoint, args.out, args.dtype, args.shard, args.workers, args.force, args.family, args.tokenizer
    )
    text = f"{result['tensors_written']} tensors of {result['family']} from {result['checkpoint']}: {args.out}"
    return result, text if result[
        "finished"
    ] else f"{text}\nother shares are still being written; the share that ends last completes the folder"


def _inspect(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tools.convert.inspecting import inspect  # noqa: PLC0415  (the subcommand's modules only)

    return inspect(args.path)


def _verify(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    with importing():
        from tools.convert.verify import verify  # noqa: PLC0415  (torch, megatron-core and transformers)

    result = verify(args.checkpoint, _folder(args.hf, "HF_DIR"), args.layers, args.sequences, args.tokens, args.tolerance)
    word = "the same model" if result["ok"] else "NOT the same model"
    return result, (
        f"{word}: max |difference| {result['max_abs_diff']:.3e} at logits up to {result['max_abs_logit']:.2f}, "
        f"argmax agrees on {result['argmax_agreement']:.2%} of {result['tokens']} tokens "
        f"({result['layers']} of {result['layers_total']} layers)"
    )
