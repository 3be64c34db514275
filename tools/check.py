"""`phalanx check`: the verdict on a config before anything starts.

In: a config's name and key=value words. Out: every problem with its fix, the layout and what follows from it; for scripts
one JSON document {"ok", "problems", "warnings", "layout", "data", "resume", "optimizer"}. Exit 0 when legal, 2 when not
(with --strict: nor warned about).

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from configs.errors import ConfigError, Notice, Problem, json_problem, report
from configs.schema import Config
from parallel import architecture as arch
from parallel.batch import consumed_seqs_after, deciding_batches, num_micro_batches, steps_of
from parallel.flops import count_parameters, training_flops
from parallel.layout import Layout
from parallel.stages import make_chunks
from pretrain.preflight.verdict import Preflight, known_vocab_size, load_to_start, preflight
from tools.draw_grid import draw_grid
from tools.draw_pipeline import draw_pipeline
from tools.optimizer_table import optimizer_json, optimizer_lines, optimizer_rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phalanx check", description="The verdict on a config, before anything starts.")
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config values that win over the file's")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--no-data", action="store_true", help="don't look for the data's files: they are elsewhere")
    parser.add_argument("--draw", action="store_true", help="also print the grid of ranks and the pipeline schedule")
    parser.add_argument("--strict", action="store_true", help="exit 2 on warnings too")
    return parser


def layout_json(config: Config, layout: Layout | None) -> dict[str, Any] | None:
    """The layout's degrees, with the micro-batches of a rank in a full step; null where they can't be derived."""
    return None if layout is None else layout.degrees() | {"num_micro_batches": _micro_batches(config, layout)}


def _micro_batches(config: Config, layout: Layout) -> int | None:
    batch = config.batch
    positive = batch.global_batch_seqs > 0 and batch.micro_batch_seqs > 0
    if not positive or batch.global_batch_seqs % (batch.micro_batch_seqs * layout.data):
        return None
    return num_micro_batches(batch, layout.data, batch.global_batch_seqs)


def _optimizer(config: Config) -> dict[str, Any] | None:
    """The parameters by optimizer; null where the size of the vocabulary is unknown."""
    vocab_size = known_vocab_size(config)
    return None if vocab_size is None else optimizer_json(optimizer_rows(config, vocab_size))


def _source_lines(sources: list[dict[str, Any]] | None) -> list[str]:
    """A line for each source of the training data; none where its files are elsewhere."""
    rows = [(row["source"], f"{row['tokens']:,} tokens, {row['epochs']:,.2f} epochs{_packed(row)}") for row in sources or []]
    width = max((len(source) for source, _ in rows), default=0)
    return [f"{'' if number else 'data':<9}{source:<{width}}  {numbers}" for number, (source, numbers) in enumerate(rows)]


def _packed(source: dict[str, Any]) -> str:
    if "padding" not in source:
        return ""
    shares = f"{source['padding']:.3%} padding, {source['cut_documents']:.2%} of the documents are cut"
    return f" of {source['samples']:,} packed sequences; {shares}"


def summary(config: Config, layout: Layout, sources: list[dict[str, Any]] | None) -> str:
    """What a legal config amounts to, for people: layout, batch, data, model, stages. `sources`: as of `source_plan`."""
    batch, model = config.batch, config.model
    micro = num_micro_batches(batch, layout.data, batch.global_batch_seqs)
    tokens = batch.global_batch_seqs * batch.seq_length_tokens
    steps = steps_of(config)
    lines = [
        f"layout   {layout.describe()} on {layout.world_size} ranks ({layout.nodes} x {layout.processes_per_node}); "
        f"ZeRO-{config.zero.stage}, {config.zero.engine}; experts' data {layout.expert_data}",
        f"batch    {batch.global_batch_seqs} sequences x {batch.seq_length_tokens} tokens = {tokens:,} tokens a step; "
        f"{micro} micro-batches of {batch.micro_batch_seqs} on each of {layout.data} data parallel ranks",
        f"run      {steps:,} steps, {consumed_seqs_after(batch, steps) * batch.seq_length_tokens:,} tokens"
        f"{', padding included' if config.data.packing == 'best_fit' else ''}",
    ]
    if len(deciding_batches(batch)) > 1:
        ramp = batch.ramp
        lines.append(f"ramp     from {ramp.start_seqs} by {ramp.increment_seqs} over {ramp.samples:,} sequences")
    lines += _source_lines(sources)
    vocab_size = known_vocab_size(config)
    if vocab_size is None:
        return "\n".join(
            [*lines, "model    size unknown: neither model.vocab_size nor a tokenizer says how many tokens there are"]
        )
    parameters = count_parameters(model, vocab_size)
    flops = training_flops(model, vocab_size, batch.seq_length_tokens)
    lines.append(
        f"model    {model.name}: {parameters.total:,} parameters, {parameters.active['all']:,} active "
        f"(all included), {flops.per_token / 1e6:,.1f} MFLOP a token"
    )
    if arch.has_delta_net(model):
        number = sum(arch.delta_layers(model))
        lines.append(
            f"layers   {number} with a gated delta net, {arch.state_elements(model):,} numbers of state each for a sequence; "
            f"{model.num_layers - number} with attention"
        )
    table = optimizer_lines(optimizer_rows(config, vocab_size)) if config.optimizer.kind == "muon" else []
    return "\n".join(lines + _stage_lines(config, layout, vocab_size) + table)


def _stage_lines(config: Config, layout: Layout, vocab_size: int) -> list[str]:
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, vocab_size, config.parallel.pipeline_split)
    if len(chunks) == 1:
        return []
    lines = []
    for stage in range(layout.pipeline):
        parts = []
        for chunk in (chunk for chunk in chunks if chunk.stage == stage):
            layers = f"{chunk.layers[0]}-{chunk.layers[-1]}" if len(chunk.layers) > 1 else ", ".join(map(str, chunk.layers))
            words = ["embedding"] * chunk.embedding + ([f"layers {layers}"] if chunk.layers else [])
            parts.append(" + ".join(words + ["prediction depths"] * (chunk.mtp > 0) + ["head"] * chunk.head))
        lines.append(f"stage {stage:<3}{'; '.join(parts)}")
    return lines


def main(argv: list[str]) -> int:
    """Run the command; see the module's head for what it prints."""
    args = _parser().parse_intermixed_args(argv)
    try:
        config = load_to_start(args.config, args.overrides, not args.no_data).config
    except ConfigError as error:
        config, found = None, Preflight(error.problems)
    else:
        found = preflight(config, not args.no_data)
    layout, problems, notices, resume = found.layout, found.problems, found.notices, found.resume
    if args.json:
        document = {
            "ok": not problems,
            "problems": [json_problem(problem) for problem in problems],
            "warnings": [notice.as_dict() for notice in notices],
            "layout": layout_json(config, layout) if config else None,
            "data": found.sources,
            "resume": resume.as_dict() if resume else None,
            "optimizer": _optimizer(config) if config and not problems else None,
        }
        print(json.dumps(document))
    else:
        _print(args.config, config, layout, problems, notices, found.sources)
        if resume and not problems:
            print(f"resume   {resume.describe()}")
    if args.draw and config and layout:
        print("\n".join(drawing(config, layout)), file=sys.stderr if args.json else sys.stdout)
    return 2 if problems or (args.strict and notices) else 0


def drawing(config: Config, layout: Layout) -> list[str]:
    """The grid and the schedule of a layout whose degrees are legal, whatever else is wrong."""
    micro = _micro_batches(config, layout)
    schedule = draw_pipeline(layout.pipeline, layout.virtual_pipeline, micro) if micro else []
    return [*draw_grid(layout), *schedule]


def _print(
    name: str,
    config: Config | None,
    layout: Layout | None,
    problems: list[Problem],
    notices: tuple[Notice, ...],
    sources: list[dict[str, Any]] | None,
) -> None:
    if problems:
        print(report(problems), file=sys.stderr)
    elif config and layout:
        print(f"{name}: fine\n{summary(config, layout, sources)}")
    for notice in notices:
        print(f"note     {notice.path}: {notice.text}")
