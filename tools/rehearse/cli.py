"""`phalanx rehearse CONFIG`: is this layout's answer the one that a single process gives?

The real engines on at most 16 local gloo ranks, a small model of the same kind with the same initial weights by name, the
same batches. Compared: loss and gradient norm of every step, every gradient of the first, every weight after the last.

Torch-free.
"""

from __future__ import annotations

import argparse
import os

from pretrain.run.process import importing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phalanx rehearse", description="A layout on CPU ranks against one process.")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values laid over the file's")
    parser.add_argument("--layouts", metavar="FILE|auto", help="a JSON list of overrides; auto: every legal pair of axis values")
    parser.add_argument("--strength", type=int, default=2, choices=(1, 2, 3), help="auto: values, pairs or triples")
    parser.add_argument("--max-ranks", type=int, default=8, help="auto: ranks of a layout at most")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: Transformer Engine's path, a GPU a rank")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main(argv: list[str]) -> int:
    """0: every layout gives the same answer; 1: one does not; 2: bad input."""
    args = _parser().parse_intermixed_args(argv)
    if args.device == "cpu":
        # Megatron-Core is prepared for the CPU, when it is imported, where no GPU is in sight.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with importing():
        from tools.rehearse.rehearse import rehearse  # noqa: PLC0415  (torch and megatron take seconds; --help must not)

    return rehearse(args)
