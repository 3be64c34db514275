"""`phalanx model`: what a model is made of: parameters, active in three conventions, FLOPs a token, bytes of its weights.

In: a preset's name, a config, or a Hugging Face config.json (or its folder). Out: a table, one JSON document, or a preset.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import load_config
from configs.model_schema import Model
from configs.sources import find_file
from configs.units import count
from parallel.architecture import padded_vocab
from parallel.flops import count_parameters, training_flops
from parallel.legality.sparse_attention import why_only_planned
from pretrain.preflight.verdict import known_vocab_size
from tools.convert.hf_config.family import UnsupportedModel
from tools.convert.hf_config.preset import interpret_config, preset_yaml, read_config

CONVENTIONS = {
    "all": "everything a token uses",
    "without_input_embedding": "without the input embedding",
    "non_embedding": "without embedding and output head",
}
EPILOG = """\
examples:
  phalanx model qwen3_30b_a3b
  phalanx model deepseek_v3 --json
  phalanx model quickstart model.vocab_size=2048
  phalanx model ~/models/Qwen3-8B/config.json --to-yaml > qwen3_8b.yaml
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phalanx model", description="Parameters, FLOPs and weight bytes of a model.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "model", metavar="PRESET|CONFIG|config.json", help="a shipped preset, a YAML file, or a Hugging Face config"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config values that win over the file's")
    parser.add_argument(
        "--seq-length", type=int, metavar="TOKENS", help="context for the attention FLOPs (default 4096, or the config's)"
    )
    parser.add_argument("--to-yaml", action="store_true", help="print it as a preset for `base:`")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _is_huggingface(name: str) -> bool:
    path = Path(os.path.expanduser(name))
    return path.suffix == ".json" or (path.is_dir() and (path / "config.json").is_file())


def _from_huggingface(name: str, overrides: list[str]) -> tuple[Model, int | None, list[str]]:
    if overrides:
        raise ConfigError(Problem("key=value", overrides[0], "belong to a YAML config", "use --to-yaml and change the preset"))
    path = Path(os.path.expanduser(name))
    family, model, problems, notes = interpret_config(read_config(path))
    refusals = [problem for problem in problems if isinstance(problem, UnsupportedModel)]
    if len(refusals) != len(problems):
        raise ConfigError([problem for problem in problems if not isinstance(problem, UnsupportedModel)])
    model.name = path.parent.name if path.suffix == ".json" and path.name == "config.json" else path.stem
    model.source = f"Hugging Face config.json of type {family.name}"
    if refusals:
        model.planning_only = "; ".join(f"{problem.path} = {problem.got!r} {problem.rule}" for problem in refusals)
    return model, None, notes


def _from_config(name: str, overrides: list[str]) -> tuple[Model, int | None, list[str]]:
    """(model, sequence length, notes); a preset has no sequence length of its own."""
    preset = find_file(name, Path.cwd()) is None
    loaded = load_config(f"model/{name}" if preset and find_file(f"model/{name}", Path.cwd()) else name, overrides)
    model = loaded.config.model
    if model.vocab_size is None:
        model.vocab_size = known_vocab_size(loaded.config)
    if model.vocab_size is None:
        rule = "must be stated: neither the config nor a tokenizer says how many tokens there are"
        raise ConfigError(Problem("model.vocab_size", None, rule, "add model.vocab_size=32000"))
    states = loaded.origin.get("batch.seq_length_tokens", "default") != "default"
    return model, loaded.config.batch.seq_length_tokens if states else None, []


def describe(model: Model, seq_length_tokens: int, notes: list[str]) -> dict[str, Any]:
    """The JSON document."""
    assert model.vocab_size, "the vocabulary is stated"
    parameters = count_parameters(model, model.vocab_size)
    stored = count_parameters(model, padded_vocab(model, model.vocab_size))
    flops = training_flops(model, model.vocab_size, seq_length_tokens)
    elements = stored.total + stored.mtp
    document: dict[str, Any] = {"name": model.name, "source": model.source, **parameters.as_dict()}
    document |= {
        "flops_per_token": flops.per_token,
        "flops_by_component": dict(vars(flops)),
        "seq_length_tokens": seq_length_tokens,
        "keys_of_a_query": model.dsa.top_k,
        # As a checkpoint holds them: vocabulary padded, prediction depths counted.
        "weights_gib": {"bf16": elements * 2 / 2**30, "fp32": elements * 4 / 2**30},
        "planning_only": why_only_planned(model) or None,
        "notes": notes,
    }
    return document


def _table(document: dict[str, Any]) -> str:
    total, mtp = document["params_total"], document["params_by_component"]["mtp"]
    lines = [
        f"{document['name']}: {total:,} parameters ({count(total)})" + (f", and {mtp:,} of prediction depths" if mtp else "")
    ]
    lines += [f"  from     {document['source']}"] if document["source"] else []
    for name, value in document["params_active"].items():
        lines.append(f"  active   {value:>19,}  {CONVENTIONS[name]} ({name})")
    for name, value in document["params_by_component"].items():
        if value:
            lines.append(f"  {name:<9}{value:>19,}  {value / (total + mtp):6.1%}")
    length = document["seq_length_tokens"]
    lines.append(f"  training {document['flops_per_token'] / 1e9:>19,.2f}  GFLOP a token, at {length} tokens of context")
    if indexer := document["flops_by_component"]["indexer"]:
        lines.append(
            f"  indexer  {indexer / 1e9:>19,.2f}  GFLOP of them, to choose at most {document['keys_of_a_query']} keys of a query"
        )
    gib = document["weights_gib"]
    lines.append(f"  weights  {gib['bf16']:>19,.2f}  GiB in bf16, {gib['fp32']:,.2f} GiB in fp32 (vocabulary padded)")
    if document["planning_only"]:
        lines.append(f"  for planning only: {document['planning_only']}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command."""
    args = _parser().parse_intermixed_args(argv)
    if args.seq_length is not None and args.seq_length < 1:
        raise ConfigError(Problem("--seq-length", args.seq_length, "must be at least 1", "give a number of tokens"))
    source = _from_huggingface if _is_huggingface(args.model) else _from_config
    model, length, notes = source(args.model, args.overrides)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.to_yaml:
        print(preset_yaml(model, f"{model.name}, from {args.model}"), end="")
        return 0
    length = args.seq_length or length or min(4096, model.max_position_tokens or 4096)
    document = describe(model, length, notes)
    print(json.dumps(document) if args.json else _table(document))
    return 0
