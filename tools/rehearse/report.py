"""The report of a rehearsal: rows as text, and what a reader must know to judge them.

In: configs and what their ranks computed. Out: lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from configs.schema import Config
from parallel.layout import make_layout
from tools.rehearse.shrink import needs_gpu_dispatcher, omitted_features, replaced_precision
from tools.rehearse.train_rank import RankResult


def header_of(configs: Sequence[Config]) -> str:
    """The heads of the columns."""
    return f"{'layout':<{_width(configs[0].optimizer.kind == 'muon')}} {'loss':>9} {'norm':>9} {'gradients':>9} {'weights':>9}"


def _width(muon: bool) -> int:
    """Of the first column, which with Muon also says how its matrices are split."""
    return 98 if muon else 76


def head_of(config: Config) -> dict[str, Any]:
    """What a row says about its layout."""
    layout, zero = make_layout(config), config.zero
    head: dict[str, Any] = {"layout": layout.describe(), "engine": zero.engine, "zero": zero.stage, "offload": zero.offload}
    muon = config.optimizer.muon
    updates = {"split_heads": muon.split_heads, "qk_clip": muon.qk_clip} if config.optimizer.kind == "muon" else None
    return head | {"ranks": layout.world_size, "micro_batch_seqs": config.batch.micro_batch_seqs, "muon": updates}


def describe(line: dict[str, Any]) -> str:
    """The row as a line of text."""
    offload = f", {line['offload']} offload" * (line["offload"] != "none")
    name = f"{line['layout']:<24} {line['engine']} ZeRO-{line['zero']}{offload}, micro-batch {line['micro_batch_seqs']}"
    if line["muon"]:
        name += f", split {line['muon']['split_heads']}" + ", QK-clip" * (line["muon"]["qk_clip"] is not None)
    if "error" in line:
        return f"{name} FAILED\n{line['error']}"
    numbers = " ".join(f"{line[key]:9.1e}" for key in ("loss_max_rel", "grad_norm_max_rel", "grad_max_rel", "weight_max_rel"))
    return f"{name:<{_width(line['muon'] is not None)}} {numbers}  {_verdict(line)}"


def _verdict(line: dict[str, Any]) -> str:
    if line["bit_equal"]:
        return "bit-equal"
    if line["ok"]:
        return "same"
    return f"WRONG: {line['first_difference']}, off by {line['first_difference_rel']:.1e}"


def model_notes(config: Config) -> list[str]:
    """What the small model leaves out or replaces."""
    found = []
    if without := omitted_features(config.model):
        found.append(f"left out, since they depend on the layout by design: {', '.join(without)}")
    if needs_gpu_dispatcher(config):
        found.append("rehearsed with the alltoall dispatcher in place of model.moe.dispatcher=flex, which needs GPUs")
    if precision := replaced_precision(config):
        values = ", ".join(f"{path}={value}" for path, value in precision.items())
        found.append(f"rehearsed in fp32, in which layouts can be compared to 1e-4, in place of {values}")
    return found


def near_tie_notes(results: Iterable[RankResult]) -> list[str]:
    """A warning where rounding may change a choice of experts."""
    near = sum(result.near_ties for result in results)
    return [f"{near} choices of experts are near ties: another rounding may correctly choose other experts"] if near else []
