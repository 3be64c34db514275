"""`phalanx rehearse CONFIG`: does this layout compute what a single process computes?

The real engines run on at most 16 local gloo ranks, with a small model of the same kind, the same initial weights by name and
the same batches. Compared are loss and gradient norm of every step, every gradient of the first step, and every weight after
the last.

Torch-free.
"""

from __future__ import annotations

import argparse
import importlib
import os

from configs.errors import ConfigError, Problem
from pretrain.run.process import importing
from tools.report.page import plotly_script


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phalanx rehearse", description="Compare a layout on CPU ranks with one process.")
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config values that win over the file's")
    parser.add_argument(
        "--layouts",
        metavar="FILE|auto",
        help="a JSON list of overrides; auto: layouts that cover every legal pair of axis values",
    )
    parser.add_argument(
        "--strength", type=int, default=2, choices=(1, 2, 3), help="auto: cover single values, pairs or triples (default: 2)"
    )
    parser.add_argument(
        "--micro-batches",
        metavar="N,N",
        help="rehearse each layout with micro-batches of so many sequences, out of 1, 2 and 4 (default: as in the config, at "
        "most 2; auto: 1,2). The same global batch must give the same answer however it is cut, where the loss allows it",
    )
    parser.add_argument("--max-ranks", type=int, default=8, help="auto: largest number of ranks (default: 8)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default: 3)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="cuda: with Transformer Engine, one GPU per rank (default: cpu)"
    )
    parser.add_argument(
        "--against",
        metavar="PYTHON",
        help="compare with the libraries of another interpreter, e.g. .venv-newest/bin/python, in place of one process",
    )
    parser.add_argument(
        "--coordinates",
        metavar="N,N",
        help="instead: train models so many times as wide, and say whether their activations grow with the width (model.mup)",
    )
    parser.add_argument("--html", metavar="FILE", help="also write an HTML page (not with --against)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main(argv: list[str]) -> int:
    """Returns the exit code. 0: every layout agrees; 1: a layout differs. Raises ConfigError for bad input."""
    args = _parser().parse_intermixed_args(argv)
    if args.html:
        if args.against:
            rule = "the page is that of layouts against one process, or of --coordinates"
            raise ConfigError(Problem("--html", args.html, rule, "leave out --against, or --html"))
        # Before a rehearsal that takes minutes.
        plotly_script()
    if args.device == "cpu":
        # Megatron-Core is set up for the CPU, when it is imported, if no GPU is visible.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # torch and megatron take seconds; --help must not.
    module, function = ("against", "rehearse_against") if args.against else ("rehearse", "rehearse")
    if args.coordinates:
        module, function = "coordinates", "check_coordinates"
    with importing():
        found = importlib.import_module(f"tools.rehearse.{module}")
    return int(getattr(found, function)(args))
