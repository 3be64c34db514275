"""A family's tensors laid out for one model: every canonical tensor's spans, and the ledger that nothing is left over.

In: family, model, and (import) what the files hold. Out: `Links`. The ledger: each row of each source tensor is used once,
each row of each target written once; vocabulary padding is the only part of a target without a source.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config.family import Family, Tensor
from tools.convert.tensors.canonical import Shape, tensor_shapes
from tools.convert.tensors.spans import Join, Span

Part = tuple[str, tuple[int, ...]]
"""A tensor, or one expert of a stacked one: (name, lead)."""


@dataclass(frozen=True)
class Links:
    """All spans of a model, by canonical part and by part of the files."""

    shapes: dict[str, Shape]
    ours: dict[Part, list[Span]]
    theirs: dict[Part, list[Span]]
    their_shapes: dict[str, Shape]

    def our_rows(self, part: Part) -> int:
        return self.shapes[part[0]][len(part[1])]


def make_links(family: Family, model: Model, holds: Callable[[str], bool] | None = None) -> Links:
    """Spans of every canonical tensor. `holds`: which of several forms the files have; without it the first is taken."""
    shapes = tensor_shapes(model)
    ours: dict[Part, list[Span]] = {}
    for name, lead, their_names, join in _named(family, model, holds):
        ours[(name, lead)] = list(join(model, name, lead, shapes[name][len(lead)], their_names))
    theirs: dict[Part, list[Span]] = {}
    for spans in ours.values():
        for span in spans:
            theirs.setdefault((span.hf, span.hf_lead), []).append(span)
    links = Links(shapes, ours, theirs, _their_shapes(theirs, shapes))
    audit(links, model)
    return links


def _named(
    family: Family, model: Model, holds: Callable[[str], bool] | None
) -> Iterator[tuple[str, tuple[int, ...], list[str], Join]]:
    """(canonical name, lead, names in the files, join) of every part."""
    kinds = arch.moe_layers(model)
    scopes: list[tuple[str, int, set[str]]] = [("", 0, {"model"})]
    for layer, is_moe in enumerate(kinds):
        scopes.append((f"decoder.layers.{layer}.", layer, {"layer", *(("moe", "expert") if is_moe else ("dense",))}))
    for depth in range(model.mtp.num_layers):
        layer, inner = model.num_layers + depth, {"moe", "expert"} if arch.mtp_is_moe(model) else {"dense"}
        scopes.append((f"mtp.layers.{depth}.", layer, {"mtp"}))
        scopes.append((f"mtp.layers.{depth}.transformer_layer.", layer, {"layer", *inner}))
    for prefix, layer, wanted in scopes:
        for rule in family.tensors:
            if rule.scope not in wanted or not rule.when(model):
                continue
            for lead in [(e,) for e in range(model.moe.num_experts)] if rule.scope == "expert" else [()]:
                yield prefix + rule.ours, lead, *_form(rule, layer, lead, holds)


def _form(rule: Tensor, layer: int, lead: tuple[int, ...], holds: Callable[[str], bool] | None) -> tuple[list[str], Join]:
    options = []
    for names, join in rule.forms:
        filled = [name.replace("{L}", str(layer)).replace("{E}", str(lead[0]) if lead else "") for name in names]
        options.append((filled, join))
    if holds is not None:
        for names, join in options:
            if all(holds(name) for name in names):
                return names, join
    return options[0]


def _their_shapes(theirs: dict[Part, list[Span]], shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Shape of each tensor of the files, from the spans that fill it."""
    result: dict[str, Shape] = {}
    leads: dict[str, int] = {}
    for (name, lead), spans in theirs.items():
        inner = shapes[spans[0].name][len(spans[0].lead) + 1 :]
        rows = max(span.hf_end for span in spans)
        block = (*inner, rows) if spans[0].transposed else (rows, *inner)
        if lead:
            leads[name] = max(leads.get(name, 0), lead[0] + 1)
            block = (leads[name], *block)
        result[name] = block
    return result


def audit(links: Links, model: Model) -> None:
    """The ledger. A failure is a bug of a family's description."""
    leads = {name: _leads(name, shape) for name, shape in links.shapes.items()}
    wanted = {(name, lead) for name in links.shapes for lead in leads[name]}
    assert wanted == set(links.ours), f"described and needed tensors differ: {sorted(wanted ^ set(links.ours))[:4]}"
    for (name, lead), spans in links.ours.items():
        edge = 0
        for span in sorted(spans, key=lambda span: span.row):
            assert span.row == edge, f"{name}{lead}: rows {edge} to {span.row} have no source, or two"
            edge += span.rows
        full = (
            model.vocab_size
            if name in ("embedding.word_embeddings.weight", "output_layer.weight")
            else links.our_rows((name, lead))
        )
        assert edge == full, f"{name}{lead}: {edge} of {full} rows have a source"
    for (name, lead), spans in links.theirs.items():
        used = np.zeros(max(span.hf_end for span in spans), dtype=np.int8)
        for span in spans:
            used[span.hf_row : span.hf_end : span.hf_step] += 1
        assert (used == 1).all(), f"{name}{lead}: rows are used {used.min()} to {used.max()} times"


def _leads(name: str, shape: Shape) -> list[tuple[int, ...]]:
    return [(index,) for index in range(shape[0])] if ".mlp.experts." in name else [()]


def width(shape: Shape, lead: tuple[int, ...]) -> int:
    """Elements of one row."""
    return prod(shape[len(lead) + 1 :])
